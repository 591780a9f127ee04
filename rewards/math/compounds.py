r"""Quantities of several units: "6 feet 5 inches", 5'11", "1 hour and 30 minutes". Compared, not converted."""

from __future__ import annotations

import re
from fractions import Fraction

from rl_lora.rewards.math.nouns import noun_phrase
from rl_lora.rewards.math.numbers import DECIMAL, number
from rl_lora.rewards.math.unit_names import known_unit, units_conflict

_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|rm)\s*\{([^{}]*)\}")
_PART = re.compile(
    rf"(?P<number>[0-9]+ [0-9]+/[0-9]+|\\frac\{{[0-9]+\}}\{{[0-9]+\}}|{DECIMAL}(?:/[0-9]+)?)"
    r"(?: ?-? ?(?P<unit>[A-Za-z]+\.?(?: (?!and\b)[A-Za-z]+\.?){0,2})|(?P<mark>''|'|\"| ?\^ ?\{?\\circ\}?))"
    r"(?P<between>,? and |[,;] ?| ?)"
)
_MARKS = {"'": "ft", "''": "in", '"': "in"}
_KINDS = (
    "yd ft in mi",
    "km m cm mm",
    "week day h min s",
    "year month",
    "kg g mg",
    "lb pound oz",
    "l ml",
    "gal",
    "$ cent",
    "degree ft in",
)

Compound = tuple[tuple[Fraction, str], ...]


def compound(text: str) -> Compound | None:
    """The numbers with their units, at least two, or None. Different things with commas or "and" between them are a
    list, not one quantity."""
    if len(text) > 100 or not text[:1].isdigit():
        return None
    text = " ".join(_TEXT.sub(r" \1 ", text).split()).replace(" ,", ",").replace(" ;", ";")
    parts, joined, position = [], False, 0
    while position < len(text):
        match = _PART.match(text, position)
        value = number(match["number"]) if match else None
        if match is None or value is None:
            return None
        words = match["unit"] or ""
        mark = match["mark"]
        unit = _MARKS.get(mark, "degree") if mark else known_unit(words) or noun_phrase(words)
        if not unit:
            return None
        parts.append((value, unit))
        position = match.end()
        joined |= position < len(text) and bool(match["between"].strip())
    one_kind = any({unit for _, unit in parts} <= set(kind.split()) for kind in _KINDS)
    if len(parts) < 2 or len({unit for _, unit in parts}) < len(parts) or (joined and not one_kind):
        return None
    return tuple(part for part in parts if part[0]) or tuple(parts[-1:])


def same_compound(a: Compound, b: Compound) -> bool:
    """Whether two have the same numbers of the same units."""
    return len(a) == len(b) and all(
        value == other and not units_conflict(unit, another)
        for (value, unit), (other, another) in zip(a, b, strict=True)
    )
