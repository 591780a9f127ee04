r"""Answers that settle on no value: "either 14 or 23", "not 36", "greater than 19", "14, maybe 23".

Read in the words around a number; what those numbers are does not matter here.
"""

from __future__ import annotations

import re

from rl_lora.rewards.math.numbers import DECIMAL, quantity

MAX_CHARS = 200
"""Longer lines are not looked at: the work is more than linear in them."""

_TIME = r"[0-9]{1,2}:[0-5][0-9](?![0-9])(?:\s?[ap]\.?\s?m\b\.?)?"
_N = rf"(?:{_TIME}|(?:\\?[$£€₹]\s?)?-?{DECIMAL}(?:/[0-9]+)?(?:\s?\\?%)?)"
_UNIT = r"(?:\s+(?!or\b|and\b|to\b|maybe\b|perhaps\b|possibly\b)[a-z]{2,}\.?){0,3}"
_TAIL = r"[^0-9]*"
_FILLER = (
    r"(?:(?:that|it|it's|this|is|are|be|must|should|would|will|always|a|an|some|any|the|in|of|value|values|number"
    r"|numbers|amount|integer|quantity|answer|answers|something|somewhere|anything|anywhere|bit|little|well|way|far|just|much|one|choice|[a-z]+ly)\s+)*"
)
_MAY = (
    r"(?:(?:could|may|might|can|would|be|is|also|well|maybe|perhaps|possibly|probably|likely|either|both|one|any|of|a"
    r"|an|the|following:?|even|else|it|value|number|numbers|values|answer|among|choice)\s+)*"
)
_COMPARED = (
    r"(?:(?:no|not|any|much|far|slightly|strictly)\s+)*(?:greater|more|less|fewer|larger|smaller|higher|lower|bigger)"
    r"\s+than(?:\s+or\s+equal\s+to)?|exceeds|exceeding|above|below|over|under|beyond|beneath|past"
)
_LIMITED = (
    r"at\s+(?:the\s+)?(?:very\s+)?(?:least|most|minimum|maximum)|bounded\s+by|up\s+to"
    r"|(?:min(?:imum)?|max(?:imum)?)\.?(?:\s+of)?"
)
_FAR = (
    r"anything\s+but|(?<!none\s)(?<!no\s)other\s+than|far\s+from|different\s+from|unequal\s+to|in\s+no\s+case|hardly"
    r"|impossible(?:\s+to\s+be)?|unlikely(?:\s+to\s+be)?|except(?:\s+for)?|instead\s+of|rather\s+than|unlike|nowhere\s+near"
)
_DENIED = re.compile(
    rf"(?:\b(?:not|never|neither|nor|cannot|no\s+longer|by\s+no\s+means|in\s+no\s+way|{_FAR})\b|n't\b)"
    rf"(?:\s+(?!and\b|but\b|or\b|so\b|only\b|just\b)[a-z']+){{0,3}}\s+{_N}{_TAIL}\Z",
    re.IGNORECASE,
)
_BOUNDED = re.compile(rf"{_FILLER}(?:{_COMPARED})\s+(?:the\s+number\s+)?{_N}{_TAIL}", re.IGNORECASE)
_AT_LEAST = re.compile(rf"{_FILLER}(?:{_LIMITED})\s+{_N}{_TAIL}", re.IGNORECASE)
_BOTH = re.compile(
    rf"{_FILLER}(?:{_COMPARED}|{_LIMITED})\s+{_N}[^0-9]*\b(?:{_COMPARED}|{_LIMITED})\s+{_N}{_TAIL}", re.IGNORECASE
)
_RANGE = re.compile(
    rf"{_FILLER}(?:between|from|within|among|around|about|(?:range|interval)(?:\s+(?:of|from))?)\s+{_N}{_UNIT}\s*"
    rf"(?:,?\s*\band\b|\bto\b|\bthrough\b|-)\s*{_N}{_TAIL}",
    re.IGNORECASE,
)
_SEVERAL = re.compile(
    rf"{_MAY}{_N}{_UNIT}(?:\s*(?:[,;/]\s*(?:\b(?:or|and)\b)?|\bor\b|\band\b)\s*{_MAY}{_N}{_UNIT})+\s*\W*", re.IGNORECASE
)
_EITHER = re.compile(rf".*?\beither\b.*?{_N}.*?\bor\b.*?{_N}{_TAIL}", re.IGNORECASE)
_OR = re.compile(
    rf".*?(?P<a>{_N})(?P<unit>{_UNIT})\s+or\s+(?:[a-z]+\s+){{0,2}}(?P<b>{_N})(?P<other>{_TAIL})", re.IGNORECASE
)
_BESIDE = re.compile(
    rf"\b(?:(?:almost|nearly|near|close\s+to|approach(?:es|ing)|tends?\s+to|within|in\s+the\s+vicinity\s+of|doubtfully|supposedly|shy\s+of|short\s+of"
    rf"|(?:just|a\s+little|a\s+bit)\s+(?:under|over|below|above))|(?:wrong|incorrect|false)\s*:?)\s+{_N}{_TAIL}\Z",
    re.IGNORECASE,
)
"""A value near another, or a wrong one."""
_CHANGED = re.compile(
    rf"\b(?:twice|thrice|times|sqrt|log|ln|sin|cos|tan|exp|plus|half|double|triple|minus|negative|(?<!other\s)than"
    rf"|(?:opposite|inverse|reciprocal|negative|square|cube|root|half|double|triple|third|quarter|logarithm|sine|cosine"
    rf"|factorial|complement|multiple|divisor|factor|power|percent|halves|thirds|quarters|fifths)\s+of"
    rf"|(?:sum|product|quotient|difference|average|mean)\s+(?:of|between)\s+{_N}\s+and)\s+(?:of\s+|the\s+|number\s+)*{_N}{_TAIL}\Z",
    re.IGNORECASE,
)
"""Another value, made of the one that is written."""
_TIME_BOUND = re.compile(
    rf"\b(?:before|after|(?:later|earlier)\s+than|between\s+{_TIME}\s*(?:and|to)|{_TIME}\s+or)\s+{_TIME}{_TAIL}\Z",
    re.IGNORECASE,
)
_EITHER_WORD = re.compile(
    rf"\W*(?:either\b[^0-9]*\bor|between\b[^0-9]*\band|from\b[^0-9]*\bto)\b[^0-9]*{_N}{_TAIL}", re.IGNORECASE
)
_MORE = re.compile(
    rf"\s*+[,;(?]?\s*+(?:or|but|and)?\s*+(?:it|this)?\s*+\b(?:or|could|may|might|maybe|perhaps|possibly|alternatively|otherwise|else)\b"
    rf"[^.\n]*?{_N}",
    re.IGNORECASE,
)


_TWICE = re.compile(
    rf"(?:either\s+)?(?P<a>{_N})\s*,?\s*\(?(?:or|i\.\s?e\.,?|that\s+is,?|equivalently)\s+(?P<b>{_N})\)?(?=\s*(?:[.!]\s*)?$)",
    re.IGNORECASE,
)


def unsettled(line: str, *, prose: bool = False) -> bool:
    """Whether the last number of a line is denied, a bound or one of several. In any prose, not behind "the answer is",
    less counts: "she needs at least 5", "that is 100/5 or 20"."""
    if len(line) > MAX_CHARS:
        return False
    if prose:
        return (
            any(kind.fullmatch(line) for kind in (_BOUNDED, _RANGE, _EITHER))
            or any(kind.search(line) for kind in (_DENIED, _BESIDE, _TIME_BOUND))
            or (" or " in line and _several(line) and _one_of_two(line))
        )
    return (
        any(kind.search(line) for kind in (_DENIED, _BESIDE, _CHANGED, _TIME_BOUND))
        or _EITHER_WORD.fullmatch(line) is not None
        or any(bound.fullmatch(line) for bound in (_BOUNDED, _RANGE, _AT_LEAST, _BOTH))
        or _several(line)
        or _one_of_two(line)
    )


def twice(line: str, rest: str) -> str | None:
    """The value of "3/4 or 75%" or of "3/4", ", or 0.75", which is said twice; None for anything else."""
    match = _TWICE.fullmatch(line) or _TWICE.match(line + rest)
    return match["a"] if match and _equal(match["a"], match["b"]) else None


def bounded(value: str) -> bool:
    """Whether what stands behind a label is a bound: "at most 73"."""
    return len(value) <= MAX_CHARS and any(bound.fullmatch(value) for bound in (_BOUNDED, _AT_LEAST))


def _several(line: str) -> bool:
    """Whether a line is "either 14 or 23", "could be 8, could be 13", "the numbers 4 and 5": not one value twice."""
    if not (_SEVERAL.fullmatch(line) or _EITHER.fullmatch(line)):
        return False
    first, *others = re.findall(_N, line)
    return not all(_equal(first, other) for other in others)


def _one_of_two(line: str) -> bool:
    """Whether a line ends in "14 or 23 apples"; "1 hour or 60 minutes" is one value in two units."""
    match = _OR.fullmatch(line)
    if match is None or _equal(match["a"], match["b"]):
        return False
    unit, other = (re.sub(r"\W", "", match[name]) for name in ("unit", "other"))
    return not unit or not other or other.startswith(unit)


def _equal(a: str, b: str) -> bool:
    x, y = quantity(a), quantity(b)
    return a == b or (x is not None and y is not None and x.equals(y))


def goes_on(rest: str) -> bool:
    """Whether another value follows behind an answer: ", could be 13", "(maybe 7)", "but perhaps 8"."""
    return _MORE.match(rest[:MAX_CHARS]) is not None
