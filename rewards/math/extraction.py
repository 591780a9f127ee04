r"""Where in a completion the answer stands. Text in, text out: nothing is parsed as mathematics here.

The work is linear in the length of the text, which is capped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_lora.rewards.math.characters import ascii_text
from rl_lora.rewards.math.clocks import HALF_DAY, PART_OF_DAY
from rl_lora.rewards.math.hedges import bounded, goes_on, twice, unsettled
from rl_lora.rewards.math.languages import (
    denied_near,
    listed_elsewhere,
    said_elsewhere,
    unsure_elsewhere,
    without_another,
)
from rl_lora.rewards.math.marked import boxed, boxes, hashes, last_match
from rl_lora.rewards.math.numbers import DECIMAL
from rl_lora.rewards.math.prose import in_json, labelled, told, without_html
from rl_lora.rewards.math.text import nothing
from rl_lora.rewards.math.words import NUMBER_WORDS

MAX_CHARS = 20_000
"""Only this many characters at the end of a completion are looked at: an answer stands at the end."""


@dataclass(frozen=True)
class Found:
    """What one method found: the text of the answer, "" if the place for it is there but empty."""

    text: str
    method: str
    boxes: tuple[str, ...] = ()
    """What each of several joined boxes holds."""


def extract(text: str, methods: Sequence[str]) -> Found | None:
    """The answer by the first method that finds its place, or None. An empty place (`\\boxed{}`) ends the search:
    a completion that declares an answer is not searched for a better one. What stands before </think> is not looked
    at."""
    text = _SPECIAL_TOKENS.sub("", text[-MAX_CHARS:].rpartition("</think>")[2])
    text = without_html(text if text.isascii() else ascii_text(text))
    for method in methods:
        found = METHODS[method](text)
        if found is not None:
            held = tuple(boxes(text) or ()) if method == "boxed" and ", " in found else ()
            return Found(_value(found) if method in STRICT else found.strip(), method, held if len(held) > 1 else ())
    return None


def _value(marked: str) -> str:
    """A marked answer without the words around it: "The answer is 28", "Area: 54"."""
    if marked.isascii() and not re.search(r"[a-zA-Z]{2}", marked):
        return marked.strip()
    spoken = phrase(marked.replace(r"\text{", " ").replace("}", " ")) if re.search(r"\bis\b", marked) else None
    return (spoken or told(marked)).strip()


_SPECIAL_TOKENS = re.compile(r"(?:<\|[a-zA-Z_]{1,30}\|>|</s>|<eos>)\s*\Z")


# ---- marked and spoken answers ----------------------------------------------------------------------------------


def tagged(text: str) -> str | None:
    """What the last <answer>...</answer> holds (any case), or the "answer" of a JSON object at the end; one that is
    never closed runs to the end of the text, as a stop string often takes the closing tag. A box, a line of #### or
    "the answer is" inside it is looked into."""
    start = last_match(re.finditer(r"<answer>", text, re.IGNORECASE))
    if start is None:
        return in_json(text)
    inside = re.split(r"</answer>", text[start.end() :], maxsplit=1, flags=re.IGNORECASE)[0]
    for method in (boxed, hashes, phrase):
        found = method(inside)
        if found is not None:
            return found
    return inside


# ---- answers in prose -------------------------------------------------------------------------------------------

_PHRASE = re.compile(
    r"(?<![\w/-])(?:(?:final\s+|correct\s+)?answers?|correct\s+(?:option|choice))"
    r"(?:\s+to\s+[^.\n:]{0,60}?)?(?:\*\*|__)?\s*"
    r"(?:is|are|=|:|equals|would\s+be|will\s+be|should\s+be)(?:\*\*|__)?"
    r"(?:\s*:|\s+(?:therefore|thus|then|simply|just|equal\s+to|given\s+by|option|choice))*\s*",
    re.IGNORECASE,
)
_MAYBE = re.compile(
    r"(?<![\w/-])answers?\s+(?:(?:could|may|might|can|must|should|would|will)(?:\s+(?:also|well|only))?(?:\s+(?P<not>not))?"
    r"|(?P<no>cannot|can't|couldn't|won't|wouldn't|shouldn't|mustn't))\s+be\s+",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"n't\s+")
_WHICH = re.compile(
    r"\s*,?\s*(?:which\s+(?:is|equals|makes|gives)|so|namely|i\.\s?e\.,?|that\s+is,?)\s+(?=[-$\\(*]*[0-9])"
)
_CAME_TO = re.compile(
    r"[0-9.,$]+ (?:times|plus|minus|and|(?:divided|multiplied) by) [0-9.,$]+ (?:is|are|equals|makes|gives) "
    r"([-$]*[0-9][^=]*)"
)
_CALCULATED = re.compile(r"[0-9.,$]+ (?:times|plus|minus|(?:divided|multiplied) by) [0-9.,$]+")
_CONTRARY = re.compile(r"\s*,?\s*but\s+(?:rather\s+|instead\s+)?(?=[-$\\(*]*[0-9])")
_END_OF_ANSWER = re.compile(
    r"\n|(?<=[^\s.\\])[.!?;](?=\s|$|\*)|,?\s+(?:because|since|so|as(?!\s+(?:many|much)\b)|which|therefore|but|and\s+not|rather\s+than|instead\s+of)\b"
    r"|,?\s+i\.\s?e\b|,\s+(?!(?:and|or|sin|cos|tan|ln|log)\b)[a-z]{2,}|(?<=[0-9%}$])\s+of\b|\s+\((?=[a-z]{3,})"
)
# Formulas hold no opening delimiter of their own kind, so that a run of those is read once, not once for each.
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:[^\\]|\\[^\[\]])+)\\\]|\\\(((?:[^\\]|\\[^()])+)\\\)"
    r"|(?<![\\$])\$(?!\$)((?:\\\$|[^$\n])*?[^\\$\n])\$",
    re.DOTALL,
)
_SIGN = "[-+\N{MINUS SIGN}]"
_HALF_BEHIND = re.compile(rf"[\s*$~]{{0,4}}(?:\\(?:text|mathrm)\s*\{{\s*)?{PART_OF_DAY}", re.IGNORECASE)
_DOZEN_BEHIND = re.compile(r"\s*doz(?:ens?)?\b")
_LABELS = "week day month year step hour round case part box group game level stage question problem".split()  # noqa: SIM905
_NO_LABEL = "".join(rf"(?<!(?i:{label}\s))" for label in _LABELS)  # "Week 3:210 pages"
_CLOCK = (
    rf"(?=[0-9]+:[0-9]){_NO_LABEL}(?:[0-9]{{1,2}}:[0-5][0-9](?::[0-5][0-9])?(?![0-9:])(?:(?i:{_HALF_BEHIND.pattern}))?"
    rf"|[0-9]+(?::[0-9]+)+)|[0-9]{{1,2}}(?i:[\s*$~]{{0,4}}(?:\\(?:text|mathrm)\s*\{{\s*)?(?:{HALF_DAY}|noon\b|o'clock\b))"
)
_WRITTEN = rf"(?:0,[0-9]{{3}}(?![0-9])|{DECIMAL})"  # 0,318 is no number, but not half of it either
_NUMBER = re.compile(
    rf"(?<![^\W_])(?<![A-Za-z0-9]_)(?<![.,/])(?:{_SIGN}?\s?[\\$£€₹]{{0,3}}{_SIGN}?)?"
    rf"(?:{_CLOCK}|[0-9]+\s+[0-9]+/[0-9]+|[0-9]+\s*\\[dt]?frac\{{[0-9]+\}}\{{[0-9]+\}}"
    rf"|\\[dt]?frac\{{{_SIGN}?[0-9.]+\}}\{{[0-9.]+\}}|{_WRITTEN}(?:[eE]{_SIGN}?[0-9]+)?(?:\s*/\s*{_WRITTEN})?)"
    r"(?:\s?\\?%|\s(?:percent|hundred|thousand|million|billion|trillion)\b)?"
)


def phrase(text: str) -> str | None:
    """What "the answer is ..." says last (also "Final answer: ...", "**Answer:** ..."): the formula in dollars that it
    names, else up to the end of the sentence; behind an equals sign only its last side ("12 + 6 = 18" is 18)."""
    last = last_match(_PHRASE.finditer(text))
    elsewhere = said_elsewhere(text)
    if elsewhere and (last is None or last.end() < elsewhere.end()):
        last = elsewhere
        if elsewhere["not"]:
            return f"not {text[last.end() :]}"
    else:
        elsewhere = None
    if " be " in text and (maybe := last_match(_MAYBE.finditer(text))) and (last is None or last.end() < maybe.end()):
        unsure = _unsure(maybe)
        if unsure is not None:
            return unsure
    if last is None:
        return None
    rest = text[last.end() :].lstrip()
    rest = rest[1:].lstrip() if rest[:1] == ":" else rest
    found = boxed(rest)
    if found is not None:
        return found
    if (formula := _over_lines(rest)) is not None:
        return _last_side(formula)
    opening = _MATH.match(rest)
    more = opening and re.match(r"\s*(?:,\s*)?(?:,|and|or)\s*(?:\$|\\\()", rest[opening.end() :])
    several = more or (opening and goes_on(_spoken(rest[opening.end() :])))
    if opening and _is_math(opening) and not several:
        return _last_side(_inside(opening)) + _half_behind(rest, opening)
    line, behind = _sentence(rest)
    if denial := _DENIAL.match(line):
        line = f"not {line[denial.end() :]}"
    elif _FALSE_LABEL.search(text[max(0, last.start() - 30) : last.start()]) or _FALSE_BEHIND.match(behind):
        return f"not {line}"
    if last is elsewhere:
        return _elsewhere(line, behind)
    if not _NUMBER.match(line) and (result := _WHICH.match(behind)):  # the sum of 12 and 5, which is 17
        line, behind = _sentence(behind[result.end() :])
    if line.startswith("not ") and (contrary := _CONTRARY.match(behind)):  # not 12 but 17
        line, behind = _sentence(behind[contrary.end() :])
    if same := twice(line, behind.split("\n")[0][:100]):
        return same
    if goes_on(_spoken(behind)) and _NUMBER.search(_spoken(line)):
        return line + behind.splitlines()[0]
    if not _NUMBER.match(line) and unsettled(_spoken(line)):
        return re.sub(r"^\W*(?:either|both)\s+", "", line)
    if (result := _WHICH.match(behind)) and _CALCULATED.fullmatch(line):
        line, behind = _sentence(behind[result.end() :])
    if came := _CAME_TO.fullmatch(line):  # 13 times 2 is 26
        return came[1]
    if re.match(r"[A-Za-z]{2,} ", line):  # "Final answer: the largest $n$ is 34"
        line = re.split(r"\b(?:is|are|equals)\s+(?=\S)", line)[-1]
    if several or line.startswith("not "):
        return line
    if not _NUMBER.match(line) and unsettled(_spoken(line)):
        return re.sub(r"^\W*(?:either|both)\s+", "", line)
    for segment in _MATH.finditer(line):
        if _is_math(segment):
            return _last_side(_inside(segment))
    bold = re.search(r"\*\*(.+?)\*\*", line)
    if bold and goes_on(_spoken(line[bold.end() :])):
        return line
    line = bold[1] + _half_behind(line, bold) if bold else line.strip("*_ ")
    if "=" in line and _last_side(line) != line:
        return _last_side(line)
    start = _NUMBER.match(line)
    if start or not _NUMBER.search(line):
        return line
    before = line[: _NUMBER.search(line).start()]  # type: ignore[union-attr]
    if re.search(r"[A-Za-z][(^*/]$", before):  # sqrt(2)
        return line
    words = re.findall(r"[A-Za-z]{3,}", before)
    return last_number(line) if words and "\\" not in line else line


_FALSE_NAME = re.compile(r"\b(?:wrong|incorrect|false|invalid|not)(?:\b|_)", re.IGNORECASE)
_FALSE_LABEL = re.compile(
    r"(?:^|[.!?;:\n*])\W*(?:(?:an?|the)\s+)?(?:wrong|incorrect|false|invalid|not(?:\s+(?:an?|the|my|our))?)\s+$",
    re.IGNORECASE,
)
_FALSE_BEHIND = re.compile(
    r",?\s*(?:which|but\s+(?:that|this|it))\s+(?:is|was)\s+(?:wrong|incorrect|false|not\s+(?:right|correct|true))\b",
    re.IGNORECASE,
)
"""What says of an answer that it is none: "Wrong answer: 73", "the answer is 42, which is wrong"."""


def _half_behind(text: str, time: re.Match[str]) -> str:
    """The half of the day or the dozen that follows a match: "$9:00$ PM", "$3$ dozen"."""
    half = _HALF_BEHIND.match(text, time.end()) or _DOZEN_BEHIND.match(text, time.end())
    return half[0] if half else ""


def _over_lines(rest: str) -> str | None:
    """The formula in single dollars that a text begins with, if it goes on over a line break."""
    end = rest.find("$", 1)
    inside = rest[1:end]
    broken = rest[:1] == "$" and 1 < end <= 1000 and "\n" in inside
    broken = broken and ("\\" in inside or re.search(r"[-+*/^=]\s*\n|\n\s*[-+*/^=]", inside) is not None)
    return inside if broken and not re.search(r"\n[ \t]*\n", inside) else None


def _sentence(rest: str) -> tuple[str, str]:
    """A text up to the end of the answer that it begins with, and what follows."""
    end = _END_OF_ANSWER.search(rest)
    return (rest[: end.start()].strip(), rest[end.start() :]) if end else (rest.strip(), "")


def _spoken(line: str) -> str:
    """A line of prose without markdown and with a number of its own for each formula in it that is not plain."""
    numerals = itertools.count(1)

    def numeral(match: re.Match[str]) -> str:
        if not _is_math(match):
            return match[0]
        inside = _inside(match).strip()
        return inside if re.fullmatch(DECIMAL, inside) else f" {next(numerals)} "

    return re.sub(
        r"\*\*|__|\$(?![0-9])|(?<!\w)[_*](?=[a-z]+[_*])|(?<=[a-z])[_*](?!\w)", "", _MATH.sub(numeral, line)
    ).strip(" :*")


def _elsewhere(line: str, behind: str) -> str | None:
    """The value behind "the answer is" in another language; None where a sentence there has none."""
    line = re.sub(r"^(?:[负負]|マイナス|마이너스|минус|minus)\s*(?=[0-9])", "-", without_another(line))
    if both := listed_elsewhere(line):
        return both
    if unsure_elsewhere(line):
        return f"not {line}"
    number = _NUMBER.search(line)
    opening = _MATH.match(line)
    if opening and _is_math(opening):
        return _last_side(_inside(opening))
    if number and not _NUMBER.match(line.lstrip("*_ $")) and re.match(r"[^\W\d_]{2,}|[^\W\d_A-Za-z]", line):
        return last_number(line) if re.match(r"\s*[^\s0-9]*\s*[^0-9]*$", line[number.end() :]) else line
    return re.sub(r"\s*(?:입니다|이다|です|だ|となる|になる)$", "", line.strip("*_ "))


def _unsure(maybe: re.Match[str]) -> str | None:
    """What stands behind "the answer could be" or "cannot be" if it is no answer and no other value follows."""
    line, behind = _sentence(maybe.string[maybe.end() :])
    denied = maybe["not"] or maybe["no"]
    if denied and not _NUMBER.search(behind):
        return f"not {line}"
    spoken = _spoken(line)
    if (unsettled(spoken) and not _NUMBER.search(behind)) or goes_on(_spoken(behind)):
        return line + behind.splitlines()[0] if behind.strip() else line
    return None


_THEREFORE = re.compile(r"(?:Thus|So|Hence|Therefore|Then|Finally),?\s+(?=[$\\a-z])")


def whole(text: str) -> str | None:
    """All of a short text without sentences: one line with at most one word that is not part of a formula."""
    text = _THEREFORE.sub("", text.strip())
    if not text or len(text) > 200 or "\n" in text:
        return None
    if nothing(text):
        return text
    if (segment := _MATH.fullmatch(text.rstrip(" .,;"))) and _is_math(segment):
        return _last_side(_inside(segment).strip())
    if (value := labelled(text)) is not None:
        return _last_side(value.strip("* "))
    bare = re.sub(r"\\(?:text|mbox|begin|end)\s*\{[^{}]*\}(?:\{[clr|]*\})?|\\[a-zA-Z]+", " ", text)
    bare = re.sub(r"\b[A-Z]{2,3}\b", " ", bare) if "=" in text else bare  # AB = CD
    words = [word for word in re.findall(r"[^\W\d_]{2,}", bare) if word.lower() not in _FORMULA_WORDS]
    if words and words[0].lower() in NUMBER_WORDS and not re.search(r"[0-9]", text) and text.startswith(words[0]):
        text = re.split(r"\s+of\s", text, maxsplit=1)[0]  # two thirds of the cake
        words = [word for word in re.findall(r"[^\W\d_]{2,}", text) if word.lower() not in NUMBER_WORDS | {"and"}]
    allowed = 0 if _MATH.search(text) else 1
    return _last_side(text) if len(words) <= allowed else None


_FORMULA_NAMES = "and or pi sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan abs floor ceil max min gcd lcm"
_FORMULA_WORDS = frozenset(_FORMULA_NAMES.split())


def last_number(text: str) -> str | None:
    """The last number, with its sign, currency and percent sign: 1,234.5, 3/4, 1 1/2, \\frac{3}{4}."""
    last = _last_numeral(text)
    return None if last is None else _signed(last)


def last_expression(text: str) -> str | None:
    """The last formula in $...$, \\(...\\) or \\[...\\] or the last number, whichever ends later; of a
    calculation its result."""
    end = text.rstrip(" .\n")
    if end.endswith("$") and end.count("$") % 2 == 0 and (over_lines := _over_lines(end[end.rfind("$", 0, -1) :])):
        return _last_side(over_lines)
    formula = None
    for match in _MATH.finditer(text):
        if _is_math(match):
            formula = match
    last = _last_numeral(text)
    if formula is not None and (last is None or last.end() <= formula.end()):
        return _unsettled_end(text, formula) or _last_side(_inside(formula))
    return None if last is None else _unsettled_end(text, last) or _of_two_units(text, last) or _signed(last)


_TWO_UNITS = re.compile(
    r"(?<![0-9.,/$])[0-9]+ (?:feet|foot|ft|hours?|hrs?|years?|weeks?|days?|minutes?|mins?|meters?|kg|kilograms?"
    r"|km|kilometers?|pounds?|lbs?|yards?),?(?: and)? [0-9]+ (?:inch(?:es)?|minutes?|mins?|months?|days?|hours?|secs?"
    r"|cm|centimeters?|seconds?|grams?|meters?|ounces?|oz|feet)\b"
)


def _of_two_units(text: str, last: re.Match[str]) -> str | None:
    """The quantity of two units that ends in the last number: "5 feet 9 inches"."""
    for match in _TWO_UNITS.finditer(text, max(0, last.start() - 40), last.end() + 20):
        if match.start() < last.start() < match.end():
            return match[0]
    return None


_LABEL = re.compile(r"\W*[A-Za-z][A-Za-z_ ]{0,30}\"?:\W*")


def _unsettled_end(text: str, last: re.Match[str]) -> str | None:
    """The end of the sentence up to its last value where that is no answer: "it is either 14 or 23", "x is not 5"."""
    before = re.split(r"(?<=[.!?;])\s+|\n", text[max(0, last.start() - 150) : last.start()])[-1]
    sentence = before + text[last.start() : last.end()]
    value = re.split(r"\b(?:is|are|was|were|be|equals|lies|ranges|it's)\s+", sentence)[-1]
    for part in (sentence, value) if value != sentence else (sentence,):
        if unsettled(_spoken(part), prose=True):
            return part
    label = _LABEL.match(sentence)
    if label and _FALSE_NAME.search(label[0]):
        return f"not {sentence[label.end() :]}"
    return sentence if label and bounded(_spoken(sentence[label.end() :])) else None


def _last_numeral(text: str) -> re.Match[str] | None:
    """The last number of a text; it is looked for at the end first, as numerals are short."""
    for start in (max(0, len(text) - 200), 0):
        last = last_match(match for match in _NUMBER.finditer(text, start) if _is_whole(match))
        if start == 0 or (last is not None and last.start() > start + 60):
            return last
    return None


def _is_whole(match: re.Match[str]) -> bool:
    """Whether no digit of another script next to a number spoils it, and no word of doubt in another language."""
    text = match.string
    if text[match.end() : match.end() + 1].isdigit() or text[match.start() - 1 : match.start()].isdigit():
        return False
    return text.isascii() or not denied_near(text[max(0, match.start() - 20) : match.end() + 8])


def _signed(match: re.Match[str]) -> str:
    """A number without a sign that is a subtraction ("9 - 4", "(x) -4")."""
    number = match[0]
    before = match.string[: match.start()].rstrip()
    if re.match(_SIGN, number) and before and (before[-1].isalnum() or before[-1] in ")]}"):
        stuck = match.string[match.start() + 1 : match.start() + 2] != " " and before != match.string[: match.start()]
        if not stuck:  # "is -4" has a space before the sign and none behind it
            number = number[1:]
    return number


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _is_math(match: re.Match[str]) -> bool:
    """Whether dollars enclose a formula rather than stand for money ("$5 for each and $")."""
    inside = _inside(match)
    if match[4] is None:
        return True
    if match.string[match.end() : match.end() + 1].isdigit():
        return False  # "$17, $52"
    bare = re.sub(r"\\[a-zA-Z]+|\\?\{[^{}]*\}", " ", inside)
    return bool(inside.strip()) and not re.search(r"[a-zA-Z]{2,}\s+\S*\s*[a-zA-Z]{2,}|^[0-9.,]+\s+[a-zA-Z]{2,}", bare)


def _last_side(formula: str) -> str:
    """Of a calculation ("12 + 6 = 18") what it comes to; an equation with names is left as it is."""
    left, equals, right = formula.rpartition("=")
    names = re.search(r"[a-zA-Z]", re.sub(r"\\(?:[dt]?frac|times|cdot|div|text\s*\{[^{}]*\})", "", left))
    return right if equals and not names and not re.search(r"[<>!:\\]$", left) else formula


METHODS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "hash": hashes,
    "tag": tagged,
    "phrase": phrase,
    "whole": whole,
    "last_number": last_number,
    "last_expression": last_expression,
}
STRICT = ("boxed", "hash", "tag")
FLEXIBLE = (*STRICT, "phrase", "whole", "last_expression")


def methods_of(extraction: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that "strict", "flexible" or a sequence of their names mean; ValueError for any other."""
    if extraction in ("strict", "flexible"):
        return STRICT if extraction == "strict" else FLEXIBLE
    methods = (extraction,) if isinstance(extraction, str) else tuple(extraction)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"extract must be 'strict', 'flexible' or names out of {', '.join(METHODS)}, got {extraction!r}"
        )
    return methods
