"""Noun phrases behind a number: "14 slices of bread", "16 left", "6 cats and dogs", "70 cm long", "8 times".

The question is which words leave the number as it is. What bounds, denies or changes it ("5 at most", "5 and a half",
"5 less than twelve") is no noun phrase, and neither is a formula ("5 x", "5 sin").
"""

from __future__ import annotations

import re

from rl_lora.rewards.math.unit_names import MULTIPLIERS, UNITS, known_unit
from rl_lora.rewards.math.words import NUMBER_WORDS

_OTHER_VALUE_NAMES = """
    if mod modulo plus minus divided multiplied pi sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan infinity
    inf factorial choose squared cubed equals when where but frac cdot halves thirds fourths fifths tenths hundredth
    hundredths thousandth thousandths dozens score scores power root base below under negative positive bc wrong
    incorrect false not no none nor never neither without least most maximum minimum max min or is was are were isn't
    less fewer than except unless remainder mil mille tausend millones millon million millionen milliarden media medio
    demi docena docenas douzaine dutzend halb alpha beta gamma delta epsilon zeta theta kappa lambda rho sigma tau phi
    chi psi omega gross lakh lakhs crore crores
"""
_PARTS_AS_NOUNS = {"quarters", "quarter", "third", "fourth", "fifth", "sixth", "eighth", "tenth", "one"}
_OTHER_VALUE = (frozenset(_OTHER_VALUE_NAMES.split()) | NUMBER_WORDS | frozenset(MULTIPLIERS)) - _PARTS_AS_NOUNS
"""Words that make another value, a formula, a bound or a denial of the number that they follow."""
_PREPOSITION_NAMES = "of in per for from on with at each every a an that which as after before than to"
_PREPOSITIONS = frozenset(_PREPOSITION_NAMES.split())
_FIRST_NAMES = "per each every altogether in for from of on at a an"
_FIRST = frozenset(_FIRST_NAMES.split())
_NEVER_FIRST_NAMES = "and to by as with over around quarters quarter one"
_NEVER_FIRST = frozenset(_NEVER_FIRST_NAMES.split())
_OBJECT_NAMES = "each every all total the them these those his her their its it this a an my our your"
_OBJECTS = frozenset(_OBJECT_NAMES.split())
_FILLER_NAMES = """
    left more total totally altogether in all remaining each every apiece times old long tall wide high deep away of the
    a an them these those this that and his her their its on at for from per with to as extra additional other again
    only now together overall by it bigger larger taller longer older younger greater heavier farther needed required
    exactly approximately roughly about whole different one than less fewer
"""
_FILLERS = frozenset(_FILLER_NAMES.split())
"""Words that do not say what is counted."""


def noun_phrase(words: str) -> str | None:
    """What is counted: "?slice bread" of "slices of bread"; None where words are no noun phrase."""
    if not re.fullmatch(r"[^\W\d_][^\d_^\\=<>+*(){}\[\]|:;]*", words) or len(words) > 100:
        return None
    words = re.sub(r"(?:out of|left over|leftover|per cent)\b", lambda m: _SAME[m[0]], words)
    parts = [part.strip("'.\"!") for part in re.split(r"[\s/,&-]+", words)]
    parts = [part for part in parts if part]
    if not words.isascii():
        return _foreign(words)
    lower = [part.lower() for part in parts]
    if not parts or len(parts) > 12 or any(len(part) == 1 and part not in "aI" for part in parts):
        return None
    compared = len(lower) > 2 and lower[0] in ("more", "less", "fewer") and "than" in lower[2:]
    changed = _OTHER_VALUE - {"than", "less", "fewer"} if compared else _OTHER_VALUE
    if changed & set(lower) or "times" in lower[1:] or lower[-1] in _PREPOSITIONS - {"each", "in"}:
        return None
    if not _may_begin(lower) or re.search(r"\band (?:more|counting|so|a)\b", " ".join(lower)):
        return None
    end = next((i for i, part in enumerate(lower) if part in _PREPOSITIONS), len(lower))
    counted = [part for part in lower[:end] if part not in _FILLERS]
    if counted and (unit := known_unit(" ".join(counted)) or UNITS.get(counted[-1] if len(counted[-1]) > 2 else "")):
        return unit
    stems = [_stem(part) for part in [*reversed(counted), *lower[end:]] if part not in _FILLERS]
    return "?" + " ".join(stems) if stems else ""


def _may_begin(words: list[str]) -> bool:
    """Whether words behind a number can begin a noun phrase: "slices of", "cm long", "in each", "per child"."""
    first = words[0]
    if first in _FIRST:
        return first in ("per", "each", "every", "altogether") or (words[1:2] != [] and words[1] in _OBJECTS)
    if first in _PARTS_AS_NOUNS:  # 84 fourth graders, but not 3 fourth of them
        return words[1:2] not in ([], ["of"]) and first not in _NEVER_FIRST
    function = len(words) == 1 and len(first) < 6 and re.match("sqrt|sin|cos|tan|log|ln|pi", first)
    return not function and first not in _NEVER_FIRST and (len(first) > 2 or first in UNITS)


_SAME = {"out of": "of", "left over": "left", "leftover": "left", "per cent": "percent"}
_IRREGULAR = {
    "children": "child",
    "people": "person",
    "men": "man",
    "women": "woman",
    "mice": "mouse",
    "geese": "goose",
}


def _stem(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ses", "s")):
        if noun.endswith(ending) and len(noun) > len(ending) + 1:
            return noun[: -len(ending)] + singular
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") and len(noun) > 3 else noun


_FOREIGN_VALUE = re.compile(
    r"^[만천백억]|ない|아니|아닙|이상|이하|미만|초과|보다|以上|以下|[半点点點分负負打不非或和至到多余餘以约約未]|[+\-]|(?<!\w)(?:не|или|и|минус|плюс|процент\w*|тыс\w*|млн|млрд|"
    r"миллион\w*|миллиард\w*|полов\w*|дюжин\w*|сот\w*|más|millón|millones|mille|demi\w*)(?!\w)",
    re.IGNORECASE,
)


def _foreign(words: str) -> str | None:
    """Counting words of other languages say nothing that is compared; numerals among them make another number."""
    if _FOREIGN_VALUE.search(words) or any(letter.isnumeric() for letter in words) or len(words) > 40:
        return None
    return ""
