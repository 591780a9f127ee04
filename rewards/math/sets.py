r"""Sets of real numbers: intervals, points, their unions and intersections, and what is left without a point.

[0,4]\cup[4,9] is [0,9], and x \neq 3 is (-\infty,3)\cup(3,\infty). Ends are compared with 60 digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mpmath

from rl_lora.rewards.math.formula import TooLarge, Undefined, Unreadable, variables
from rl_lora.rewards.math.reader import read
from rl_lora.rewards.math.values import evaluate

Split = Callable[[str, str], list[str]]
Piece = tuple[Any, bool, Any, bool]  # low end, whether it is in, high end, whether it is in
MAX_PIECES = 16

_REALS = re.compile(
    r"(?:[a-zA-Z]\s*\\in\s*)?\\mathbb\s*\{?R\}?|(?:\\text\s*\{)?\s*(?:the\s+)?(?:set\s+of\s+)?(?:(?:all|any|every)\s+)?(?:the\s+)?"
    r"real(?:\s+number)?s?\s*\}?|\(-\\infty,\s*\+?\\infty\)",
    re.IGNORECASE,
)
_AND = (
    r",\s*(?=[a-zA-Z]\s*\\neq?(?![a-zA-Z]))|\\cap(?![a-zA-Z])|\\(?:wedge|land)(?![a-zA-Z])|\\text\s*\{\s*and\s*\}"
    r"|(?<![a-zA-Z\\])and(?![a-zA-Z])"
)
_OR = r"\\cup(?![a-zA-Z])|\\(?:vee|lor)(?![a-zA-Z])|,?\s*\\text\s*\{\s*or\s*\}|(?<![a-zA-Z\\]),?\s*or(?![a-zA-Z])"
_UNEQUAL = re.compile(r"\\?[a-zA-Z]+\s*(?:\\neq?(?![a-zA-Z])|!=)\s*(.+)")
_MINUS = r"\\setminus(?![a-zA-Z])|\\backslash(?![a-zA-Z])|-(?=\s*\\\{)"
_EXCEPT = re.compile(
    r"^(.*?)(?:\\text\s*\{\s*|(?<=[a-z]))\s*except(?:\s+for)?\s*\}?\s*(?:[a-z]\s*=\s*)?([^{}a-z]*|.*\\(?:frac|sqrt|pi).*)$"
)
_BUILT = re.compile(r"\\\{\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\||\\vert)\s*(.*)\\\}")
_MARKED = re.compile(rf"{_AND}|{_OR}|\\neq?(?![a-zA-Z])|!=|\\setminus|\\backslash|real", re.IGNORECASE)


def same_set(answer: str, reference: str, split: Split, as_interval: Callable[[str], str]) -> bool:
    """Whether both texts are sets of real numbers, one of them in several parts, and the same."""
    if not (_MARKED.search(answer) or _MARKED.search(reference)):
        return False
    try:
        with mpmath.workdps(80):
            a, b = (_union(text, split, as_interval) for text in (answer, reference))
            return len(a) == len(b) and all(_same_piece(x, y) for x, y in zip(a, b, strict=True))
    except (Unreadable, TooLarge, Undefined, ValueError, RecursionError):
        return False


def _same_piece(a: Piece, b: Piece) -> bool:
    return a[1] == b[1] and a[3] == b[3] and _equal(a[0], b[0]) and _equal(a[2], b[2])


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b or (mpmath.isfinite(a) and mpmath.isfinite(b) and mpmath.almosteq(a, b, 1e-60, 1e-60)))


def _union(text: str, split: Split, as_interval: Callable[[str], str]) -> list[Piece]:
    pieces: list[Piece] = []
    if match := _EXCEPT.match(text):
        closing = "}" if r"\text" in match[1] else ""
        text = rf"{match[1].rstrip()}{closing} \setminus \{{{match[2]}\}}"
    for part in split(text, _OR):
        found: list[Piece] | None = None
        for factor in split(part, _AND):
            one = _one(factor, split, as_interval)
            found = one if found is None else [both for a in found for b in one if (both := _meet(a, b))]
        pieces += found or []
    if not pieces or len(pieces) > MAX_PIECES:
        raise Unreadable("no set, or one of too many pieces")
    pieces.sort(key=lambda piece: (piece[0], not piece[1]))
    merged = pieces[:1]
    for low, has_low, high, has_high in pieces[1:]:
        start, has_start, end, has_end = merged[-1]
        if (low > end and not _equal(low, end)) or (_equal(low, end) and not (has_low or has_end)):
            merged.append((low, has_low, high, has_high))
        elif high > end and not _equal(high, end):
            merged[-1] = (start, has_start, high, has_high)
        elif _equal(high, end):
            merged[-1] = (start, has_start, end, has_end or has_high)
    return merged


def _one(text: str, split: Split, as_interval: Callable[[str], str]) -> list[Piece]:
    text = text.strip()
    if match := _BUILT.fullmatch(text):
        return _union(match[1], split, as_interval)
    parts = split(text, _MINUS)
    if len(parts) == 2 and parts[0]:
        found = _one(parts[0], split, as_interval)
        for low, has_low, high, has_high in _one(parts[1], split, as_interval):
            rest = [(-mpmath.inf, False, low, not has_low), (high, not has_high, mpmath.inf, False)]
            found = [both for a in found for b in rest if (both := _meet(a, b))]
        return found
    if _REALS.fullmatch(text):
        return [(-mpmath.inf, False, mpmath.inf, False)]
    if match := _UNEQUAL.fullmatch(text):
        return _without(_number(match[1]))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return [(value, True, value, True) for value in map(_number, split(text[2:-2], ","))]
    interval = as_interval(text)
    ends = split(interval[1:-1], ",")
    if interval[:1] not in ("(", "[") or interval[-1:] not in (")", "]") or len(ends) != 2:
        raise Unreadable(f"{text!r} is no interval")
    low, high = map(_number, ends)
    if low > high or (_equal(low, high) and interval[0] + interval[-1] != "[]"):
        raise Unreadable(f"{text!r} is empty")
    return [(low, interval[0] == "[", high, interval[-1] == "]")]


def _without(value: Any) -> list[Piece]:
    return [(-mpmath.inf, False, value, False), (value, False, mpmath.inf, False)]


def _meet(a: Piece, b: Piece) -> Piece | None:
    """What two pieces have in common."""
    low, has_low = (a[0], a[1] and b[1]) if _equal(a[0], b[0]) else max((a[:2], b[:2]), key=lambda end: end[0])
    high, has_high = (a[2], a[3] and b[3]) if _equal(a[2], b[2]) else min((a[2:], b[2:]), key=lambda end: end[0])
    empty = low > high or (_equal(low, high) and not (has_low and has_high))
    return None if empty else (low, has_low, high, has_high)


def _number(text: str) -> Any:
    if match := re.fullmatch(r"([+-]?)\s*\\infty", text.strip()):
        return -mpmath.inf if match[1] == "-" else mpmath.inf
    tree = read(text)
    if variables(tree):
        raise Unreadable("an end that is no number")
    value = evaluate(tree, {})
    value = value if isinstance(value, mpmath.mpf | mpmath.mpc) else mpmath.mpf(value.numerator) / value.denominator
    if mpmath.im(value) != 0:
        raise Unreadable("an end that is not real")
    return mpmath.re(value)
