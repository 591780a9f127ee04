r"""Words around a value: "Total: 19", "\text{The answer is } 28", "He has 12 stamps.", "答案是 36", {"answer": 37}.

What is taken out of a sentence is the one value that it names. A sentence with two numbers, a bound or a denial is left
as it is, and so judged as what it says.
"""

from __future__ import annotations

import re

from rl_lora.rewards.math.clocks import clock
from rl_lora.rewards.math.hedges import unsettled
from rl_lora.rewards.math.languages import ANSWER_ELSEWHERE
from rl_lora.rewards.math.numbers import DECIMAL, quantity
from rl_lora.rewards.math.text import plain
from rl_lora.rewards.math.words import NUMBER_WORDS, digits

MAX_CHARS = 200
"""Longer texts are no short sentence."""

_ANSWER = (
    r"(?:(?:the|my|our|so|thus|final|correct|right|numerical|numeric)\s+)*"
    r"(?:answer|ans|result|solution|total|sum|value)"
)
_LABEL = re.compile(r"(?P<label>[^\W\d_](?:[^\W\d_]|[ '’()/-](?!$)){0,40}?)\s*[:=]\s*(?P<value>\S.*)", re.DOTALL)
_UNLABELLED = re.compile(rf"{_ANSWER}\b\.?\s+(?P<value>[-+$\\(]*[0-9].*)", re.IGNORECASE)
_NO_LABEL_NAMES = """
    question problem input given hint step case example page exercise chapter part note not wrong incorrect false never
    except guess maybe perhaps least most minimum maximum than approximately between or no isn't bound limit attempt
"""
_NO_LABEL = frozenset(_NO_LABEL_NAMES.split())
_NUMERAL = re.compile(rf"(?<![^\W_])(?:-\s?)?(?:\\?[$€£₹¥]\s?)?(?:-\s?)?{DECIMAL}(?:\s*/\s*[0-9]+)?|\\frac")
_UNSURE_NAMES = """
    not no never neither nor cannot isn't wasn't least most than between either or maybe perhaps possibly probably if
    unless almost nearly about roughly over under below above except only half twice double triple dozen minus negative
    sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan abs floor ceil mod gcd lcm max min pi choose infinity
    alpha beta gamma delta epsilon theta lambda sigma omega phi psi root square squared cube cubed power
    nobody none failed fails fail doubt doubts false lacks lack lacking
    less fewer up without wrong incorrect false least minimum maximum until beyond plus remainder base times each
"""
_UNSURE = (frozenset(_UNSURE_NAMES.split()) | NUMBER_WORDS) - {"one", "second", "third", "fourth", "fifth"}


def told(text: str) -> str:
    """The value that a short label or sentence names, or the text as it is."""
    if len(text) > MAX_CHARS or not re.search(r"[^\W\d_]{2}", text):
        return text
    return labelled(text) or _in_sentence(_opened(text)) or text


def labelled(text: str) -> str | None:
    """What stands behind the label of a short line: "Total: 19", "Ans. 26", "Answer 57"."""
    opened = _opened(text)
    if label := _LABEL.fullmatch(opened):
        return _labelled(label["label"], label["value"], opened)
    match = _UNLABELLED.fullmatch(opened)
    return match["value"] if match and quantity(match["value"].strip(" .")) is not None else None


def _opened(text: str) -> str:
    return " ".join(plain(text).replace("~", " ").split()) if "\\text" in text else text.replace("**", "").strip()


def _labelled(label: str, value: str, text: str) -> str | None:
    words = re.findall(r"[^\W\d_]+", label.lower())
    if _NO_LABEL & set(words) or len(words) > 6:
        return None
    if "=" in text[len(label) : len(text) - len(value)]:
        return None if len(words) < 2 and len(label) < 4 else _plain_value(value)
    if re.fullmatch(rf"{_ANSWER}s?|{ANSWER_ELSEWHERE}", label, re.IGNORECASE):
        return value if not re.search(r"[0-9]", value) or len(value) > MAX_CHARS else _plain_value(value)
    if len(label) < 3 or label.isupper() or not re.match(r"[-+$€£(\[{\\]*(?:[0-9]|[a-zA-Z\\])", value):
        return None
    return _plain_value(value)


def _plain_value(value: str) -> str | None:
    """A value without words around it (a unit aside) behind a label."""
    if quantity(digits(value.strip().strip("*$.!"))) is not None or clock(value) is not None:
        return value
    bare = re.sub(r"\\[a-zA-Z]+", " ", value)
    return value if not re.search(r"[^\W\d_]{3,}|[:=<>]", bare) and re.search(r"[0-9\\^]", value) else None


def _in_sentence(text: str) -> str | None:
    """The only number of a sentence, with what it counts; or the one that the sentence ends with behind "is"."""
    if text.endswith("?"):
        return None
    text = text.rstrip(" .!")
    numerals = list(_NUMERAL.finditer(text))
    if not numerals or "\\" in text[: numerals[-1].start()]:
        return None
    last = numerals[-1]
    before, value = text[: last.start()], text[last.start() :]
    words = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", before.lower())
    if (
        not words
        or (len(words) == 1 and len(words[0]) < 4 and before.islower())  # "for 6" is no sentence
        or words[-1] in _NO_LABEL
        or re.search(r"[<>=+*/^_|\\(\[{:-]\s*$", before)
        or unsettled(text, prose=True)
    ):
        return None
    if len(numerals) > 1:
        copula = re.search(r"\b(?:is|are|equals|makes)\s+$", before)
        if copula is None or not before[:1].isupper():
            return None
        words = []
    if (_UNSURE - {"each"}) & set(words) or not re.search(r"[^\W\d_]{2,}\s$|[^\W\d_]{2,}\s[$€£]?$", before):
        return None
    named = re.search(r"[^\W\d_]{2,} [a-zA-Z] (?:is|equals) $", before)  # the value of x is
    if not all(len(word) > 1 or word in ("a", "i") or named for word in words) or re.search(r"[=<>+*^_{}]", before):
        return None
    return value if quantity(value) is not None else None


# ---- JSON, HTML ---------------------------------------------------------------------

_JSON = re.compile(
    r"\"(?:final[ _]?)?(?:answer|result|solution|output)\"\s*:\s*\[?\s*"
    r"(?:\"((?:[^\"\\]|\\.)*)\"|(-?[0-9][0-9.eE+-]*|true|false)|null)\s*\]?\s*"
    r"(?:,[^{}]*)?\}\s*(?:```)?\s*\Z",
    re.IGNORECASE,
)


def in_json(text: str) -> str | None:
    """The "answer" of a JSON object at the end of a text."""
    if not text.rstrip().endswith(("}", "```")) or '"' not in text:
        return None
    match = _JSON.search(text[-2000:])
    if match is None:
        return None
    if match[1] is None:
        return match[2] or ""  # null
    return match[1].replace(r"\\", "\\").replace(r"\"", '"')


_RAISED = re.compile(r"<(su[pb])>\s*([^<>]{1,20})\s*</\1>", re.IGNORECASE)
_HTML = re.compile(
    r"</?(?:b|strong|i|em|u|p|span|code|mark|center|div|font|h[1-6]|small|big|pre|br|tt)(?:\s[^<>]{0,80})?/?>",
    re.IGNORECASE,
)


def without_html(text: str) -> str:
    """The text without tags that change its looks: <b>52</b>."""
    if "</" not in text and "<br" not in text:
        return text
    text = _RAISED.sub(lambda match: f"{'^' if match[1].lower() == 'sup' else '_'}{{{match[2]}}}", text)
    return _HTML.sub("", text)
