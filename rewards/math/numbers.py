"""Plain numbers with their units, read exactly: integers, decimals, fractions, mixed numbers, percentages.

The fast path of the math verifier. No sympy, no floats, no evaluation; the work is bounded by the caps below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rl_lora.rewards.math.unit_names import CURRENCY, MULTIPLIERS, units_conflict
from rl_lora.rewards.math.units import split_unit

MAX_DIGITS = 1000
"""A number with more digits than this is not read."""
MAX_EXPONENT = 1000
"""A power of ten beyond this is not read."""


@dataclass(frozen=True)
class Quantity:
    """An exact number and its unit: "%", a known unit, "" for an unknown one, None for none."""

    value: Fraction
    unit: str | None = None

    def equals(self, other: Quantity) -> bool:
        """Equal numbers whose units, where both have one, agree. A percent sign on one side only may be read both
        ways: 50% equals 50 (a unit that was left out) and equals 0.5 (what it means); with two signs 50% is 50%.
        Units are compared, never converted."""
        if units_conflict(self.unit, other.unit):
            return False
        if self.value == other.value:
            return True
        if (self.unit == "%") == (other.unit == "%"):
            return False
        percent, plain = (self, other) if self.unit == "%" else (other, self)
        return percent.value == 100 * plain.value


_GROUPED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{_GROUPED}(?:\.[0-9]*)?|\.[0-9]+)"
_SIGNED = rf"[+-]?\s*{DECIMAL}"
_ARGUMENT = rf"(?:\{{\s*({_SIGNED})\s*\}}|\s*([0-9]))"
_FRAC = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_MIXED_FRAC = re.compile(rf"([0-9]+)\s*{_FRAC.pattern}")
_SLASH = re.compile(rf"\(?\s*({_SIGNED})\s*\)?\s*/\s*\(?\s*({_SIGNED})\s*\)?")
_MIXED_SLASH = re.compile(r"([0-9]+)(?:\s+(?:and\s+)?|\s*\+\s*(?=[0-9]+\s*/))([0-9]+)\s*/\s*([0-9]+)")
_SCIENTIFIC = re.compile(
    rf"({DECIMAL})\s*(?:[eE]([+-]?[0-9]+)"
    r"|(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([+-]?[0-9]+)))"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([0-9]+))")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar)\s*\{?\s*([0-9]+)\s*\}?|\(([0-9]+)\))")
_DOTTED = re.compile(r"([0-9]*)\.([0-9]*)(?:\\dot\s*\{?\s*([0-9])\s*\}?(?:([0-9]*)\\dot\s*\{?\s*([0-9])\s*\}?)?)")
_DECIMAL = re.compile(DECIMAL)


def quantity(text: str) -> Quantity | None:
    """The number with its unit that a cleaned text is, or None if it is anything else (or beyond the caps)."""
    stem, unit = split_unit(text)
    if unit == "%":  # "50\% \text{ of them}" has two
        stem = stem.rstrip()
    elif unit == "":
        inner, second = split_unit(stem)
        if second is not None and (second == "%" or second.startswith("degree")):
            stem, unit = inner, second
    stem, factor = _multiplier(stem)
    if factor == 1 and unit is not None and stem != text:
        stem, factor = _multiplier(stem)
    sign, stem, currency = _prefix(stem)
    if currency:
        if units_conflict(currency, unit):
            return None
        unit = currency
    value = number(stem)
    return None if value is None else Quantity(sign * factor * value, unit)


def _multiplier(stem: str) -> tuple[str, int]:
    factor = 1
    for _ in range(2):  # hundred thousand
        words = stem.rsplit(None, 1)
        if len(words) < 2 or words[1].lower() not in MULTIPLIERS:
            break
        stem, factor = words[0].rstrip(), factor * MULTIPLIERS[words[1].lower()]
    return stem, factor


def _prefix(stem: str) -> tuple[int, str, str | None]:
    """Sign, rest and currency of "-$5", "$-5", "+5"."""
    sign, currency = 1, None
    for _ in range(3):
        stem = stem.lstrip()
        for mark, unit in CURRENCY.items():
            if currency is None and stem.startswith(mark):
                stem, currency = stem[len(mark) :].lstrip(), unit
        if stem[:1] in ("+", "-"):
            if stem[1:2] in ("+", "-"):
                return sign, stem, currency
            sign, stem = (-sign if stem[0] == "-" else sign), stem[1:]
        while stem.startswith("{") and stem.endswith("}") and "{" not in stem[1:]:
            stem = stem[1:-1]
    return sign, stem.strip(), currency


def number(text: str) -> Fraction | None:
    r"""The exact value of an unsigned number: 1,234.5, 3/4, \frac34, 1\frac12, 1 1/2, 2.5e3, 10^6, 0.\overline{3}."""
    if not text.isascii() or sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    if _DECIMAL.fullmatch(text):
        return _fraction(text)
    if match := _SLASH.fullmatch(text):
        return _ratio(_fraction(match[1]), _fraction(match[2]))
    if match := _FRAC.fullmatch(text):
        return _ratio(_fraction(match[1] or match[2]), _fraction(match[3] or match[4]))
    if match := _MIXED_FRAC.fullmatch(text):
        part = _ratio(_fraction(match[2] or match[3]), _fraction(match[4] or match[5]))
        return None if part is None or part < 0 else int(match[1]) + part
    if match := _MIXED_SLASH.fullmatch(text):
        part = _ratio(_fraction(match[2]), _fraction(match[3]))
        return None if part is None else int(match[1]) + part
    if match := _SCIENTIFIC.fullmatch(text):
        return _scaled(_fraction(match[1]), match[2] or match[3] or match[4])
    if match := _POWER_OF_TEN.fullmatch(text):
        return _scaled(Fraction(1), match[1] or match[2])
    if match := _REPEATING.fullmatch(text) or _DOTTED.fullmatch(text):
        whole, fixed, repeated = match[1] or "0", match[2], "".join(part or "" for part in match.groups()[2:])
        start = Fraction(int(whole + fixed), 10 ** len(fixed))
        return start + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return None


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _ratio(a: Fraction, b: Fraction) -> Fraction | None:
    return a / b if b else None


def _scaled(value: Fraction, exponent: str) -> Fraction | None:
    power = int(exponent)
    return value * Fraction(10) ** power if abs(power) <= MAX_EXPONENT else None
