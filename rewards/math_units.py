"""Units and other words behind a number: what is taken off, what is kept to be compared, and what is neither."""

from __future__ import annotations

import re

_UNIT_NAMES = {
    "%": "% percent percentage pct",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "$": "dollar dollars usd buck bucks",
    "cent": "cent cents ¢",
    "€": "euro euros eur",
    "£": "pound sterling gbp",
    "₹": "rupee rupees inr rs",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilo kilos",
    "oz": "oz ounce ounces",
    "lb": "lb lbs pound pounds",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l liter liters litre litres",
    "gal": "gal gallon gallons",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mi/h": "mph",
    "unit": "unit units",
    "am": "am a.m",
    "pm": "pm p.m",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
CURRENCY = {
    r"\$": "$",
    "$": "$",
    "US$": "$",
    "USD": "$",
    "€": "€",
    "£": "£",
    "₹": "₹",
    "Rs.": "₹",
    "Rs": "₹",
    "¥": "¥",
    r"\pounds": "£",
    r"\euro": "€",
}
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Words behind a number that make it part of a formula or of a sentence, not a quantity.
_NO_UNIT_NAMES = """
    and or to of by if as mod modulo times plus minus over divided multiplied pi sqrt sin cos tan cot sec csc log ln exp
    arcsin arccos arctan infinity inf factorial choose squared cubed is not than equals only when where for but with
    frac cdot left right from half halves third thirds fourths tenth tenths hundredth hundredths thousandth thousandths
"""
_CONNECTIVES = frozenset(
    ("and", "or", "to", "not", "times", "plus", "minus", "over", "mod", "than", "squared", "cubed")
)
_CONNECTIVES |= {"half", "halves", "third", "thirds", "tenth", "tenths", "hundredths", "thousandths", "factorial"}
_NO_UNITS = frozenset(_NO_UNIT_NAMES.split())

_WRAPPED_UNIT = re.compile(
    r"\\(?:text|mbox|textrm|textit|textbf|textnormal|mathrm|mathit|hbox|rm|operatorname)\s*\{([^{}]*)\}"
    r"\s*(?:\^\s*\{?([0-9])\}?)?$"
)
_DEGREES = re.compile(
    r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)\s*(?:(?:\\(?:text|mathrm|rm)\s*\{?\s*)?[CF]\}?)?$"
)
_UNIT_FRACTION = re.compile(r"\}\s*/\s*\\(?:text|mathrm|mbox)\s*\{")
_TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc")
_CURRENCY_BEHIND = re.compile(r"(?<=[0-9 ])(\\\$|\$|€|£|₹)$")
_PERCENT = re.compile(r"\\?%$")
_PLAIN_UNIT = re.compile(r"(?<![A-Za-z\\_^])([A-Za-z¢][A-Za-z .'/-]*)(?:\^\s*\{?([0-9])\}?)?$")


def split_unit(text: str) -> tuple[str, str | None]:
    """A cleaned text and the unit that stands behind it, in one spelling: "cm^2" of `15\\mbox{ cm}^2`.

    None where nothing was taken off; "" for a unit of no known kind ("eggs"), which is taken off and says nothing.
    A plain single letter, as in 5x, stays: it may be a variable. (Behind a space, `5 m`, it may be a unit.)
    """
    text = _UNIT_FRACTION.sub("/", text)
    if (match := _CURRENCY_BEHIND.search(text)) and text[: match.start()].strip():
        return text[: match.start()].rstrip(), CURRENCY[match[1]]
    if match := _PERCENT.search(text):
        return text[: match.start()].rstrip(), "%"
    if (match := _DEGREES.search(text)) and text[: match.start()].strip() and not _TRIGONOMETRIC.search(text):
        return text[: match.start()].rstrip(), "degree"
    if (match := _WRAPPED_UNIT.search(text)) and text[: match.start()].strip(" {}"):
        words = match[1].strip()
        if not _is_wrapped_unit(words):
            return text, None
        return text[: match.start()].rstrip(), _unit(words, match[2])
    if match := _PLAIN_UNIT.search(text):
        stem, words = text[: match.start()], match[1].strip()
        # Behind a formula only a longer word that is known to be a unit: the h of "2\\pi r h" is a variable. Behind a
        # number any noun, with a space between: 2xy is a product.
        known = _is_known(words)
        if re.search(r"[0-9}]\s*-?$", stem) and re.fullmatch(r"[^A-Za-z]*|\s*\\frac[^A-Za-z]*", stem):
            fits = (known and (len(words) > 1 or stem.endswith(" "))) or (stem[-1:] in " -" and _is_noun(words))
        else:
            fits = known and len(words) > 1 and stem.endswith(" ")
        if stem.strip() and fits:
            return stem.rstrip(" -"), _unit(words, match[2])
    return text, None


def _is_wrapped_unit(words: str) -> bool:
    """Whether words in \\text{} say of what a number is so many: not a letter (4\\mathrm{i}), not " or 6"."""
    parts = set(re.split(r"[^a-z]+", words.lower()))
    plain = not words or re.fullmatch(r"[A-Za-z .,'/()\\%-]*(?:\^\s*\{?[0-9]\}?)?", words) is not None
    return (
        plain
        and (len(words) != 1 or words.lower() in _UNITS)
        and not parts & _CONNECTIVES
        and not parts & set(MULTIPLIERS)
    )


def _is_known(words: str) -> bool:
    """Whether words are one unit (cm, "square feet", m/s) or the ending of an ordinal (4th)."""
    words = " ".join(words.lower().rstrip(".").split())
    parts = re.split(r"[ /]+", words)
    return (
        words in _UNITS
        or words in ("st", "nd", "rd", "th")
        or (len(parts) > 1 and all(part in _UNITS or part in ("per", "square", "sq", "cubic", "cu") for part in parts))
    )


def _is_noun(words: str) -> bool:
    parts = re.split(r"[ /.-]+", words.lower())
    return len(parts) <= 6 and len(parts[0]) > 2 and not _NO_UNITS & set(parts) and not set(parts) & set(MULTIPLIERS)


def _unit(words: str, power: str | None) -> str:
    """The one spelling of a unit; "" if it is of no known kind."""
    words = " ".join(words.lower().strip(" .").split())
    for prefix, exponent in (("square ", "2"), ("sq ", "2"), ("sq. ", "2"), ("cubic ", "3"), ("cu ", "3")):
        if words.startswith(prefix):
            words, power = words[len(prefix) :], exponent
    if match := re.fullmatch(r"(.*?)\s*\^\s*\{?([0-9])\}?", words):
        words, power = match[1], match[2]
    rate = re.split(r"\s*/\s*|\s+per\s+", words)
    if len(rate) == 2 and rate[0] in _UNITS and rate[1] in _UNITS:
        return f"{_UNITS[rate[0]]}/{_UNITS[rate[1]]}"
    unit = _UNITS.get(words.rstrip("."), "")
    return f"{unit}^{power}" if unit and power and power != "1" else unit


def units_conflict(a: str | None, b: str | None) -> bool:
    """Whether two quantities carry units of known and different kinds. A unit on one side only is no conflict."""
    return bool(a and b and a != b)
