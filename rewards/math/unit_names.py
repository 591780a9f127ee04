"""The units that are told apart, by all their names: cm, "square feet", m/s, dollars. Compared, never converted."""

from __future__ import annotations

import re

_UNIT_NAMES = {
    "%": "% percent percentage pct",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "$": "dollar dollars usd buck bucks",
    "cent": "cent cents ¢",
    "€": "euro euros eur",
    "£": "sterling gbp quid",
    "pound": "pound pounds",
    "pence": "pence",
    "₹": "rupee rupees inr rs",
    "¥": "¥ 元",
    "yen": "yen jpy",
    "yuan": "yuan rmb cny",
    "₩": "won krw",
    "peso": "peso pesos",
    "₽": "ruble rubles rouble roubles rub",
    "franc": "franc francs chf",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres cms",
    "dm": "dm decimeter decimeters decimetre decimetres",
    "m": "m meter meters metre metres",
    "km": "km kms kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yds yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams gm gms",
    "kg": "kg kgs kilogram kilograms kilo kilos",
    "oz": "oz ounce ounces",
    "lb": "lb lbs",
    "ton": "ton tons tonne tonnes",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l liter liters litre litres",
    "gal": "gal gallon gallons",
    "qt": "qt quart quarts",
    "pt": "pint pints",
    "acre": "acre acres",
    "ha": "ha hectare hectares",
    "s": "s sec secs second seconds",
    "ms": "ms millisecond milliseconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks wk wks",
    "month": "month months",
    "year": "year years yr yrs",
    "unit": "unit units",
    "bit": "bit bits",
    "byte": "byte bytes",
    "kB": "kb kilobyte kilobytes",
    "MB": "mb megabyte megabytes",
    "GB": "gb gigabyte gigabytes",
    "TB": "tb terabyte terabytes",
    "Hz": "hz hertz",
    "kHz": "khz kilohertz",
    "W": "watt watts",
    "kW": "kw kilowatt kilowatts",
    "J": "joule joules",
    "kJ": "kj kilojoule kilojoules",
    "N": "newton newtons",
    "V": "volt volts",
    "A": "amp amps ampere amperes",
    "Ω": "ohm ohms",
    "Pa": "pa pascal pascals",
    "mol": "mol mole moles",
    "cal": "cal calorie calories",
    "kcal": "kcal kilocalorie kilocalories",
    "knot": "knot knots",
    "am": "am a.m",
    "pm": "pm p.m",
}
UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
CAPITALS = {"N": "N", "J": "J", "W": "W", "V": "V", "Hz": "Hz", "Pa": "Pa", "K": "kelvin"}
"""Units of one capital: only in \\text{} behind a number, for 5 N is a product."""
_RATES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "mps": "m/s"}
_EITHER = {"pound": ("lb", "£"), "¥": ("yen", "yuan"), "degree": ("degree C", "degree F")}
"""Names of more than one unit."""
CURRENCY = {
    r"\$": "$",
    "$": "$",
    r"US\$": "$",
    "US$": "$",
    "USD": "$",
    "€": "€",
    "£": "£",
    "₹": "₹",
    "Rs.": "₹",
    "Rs": "₹",
    "¥": "¥",
    "₩": "₩",
    "₽": "₽",
    r"\pounds": "£",
    r"\euro": "€",
}
MULTIPLIERS = {
    "dozen": 12,
    "dozens": 12,
    "doz": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


_FACTOR = re.compile(r"([A-Za-z¢%Ω元.]+?)\.?(?:\^?\{?(-?[1-4])\}?)?")
_LONG_POWERS = (
    (re.compile(r"\b(?:square|sq\.?)\s+([a-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+([a-z]+)"), r"\1^3"),
    (re.compile(r"\b([a-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"\b([a-z]+)\s+cubed\b"), r"\1^3"),
)


def known_unit(words: str) -> str | None:
    """The one spelling of a unit of known kind: cm, "square feet" (ft^2), m/s, "m s^{-1}", "miles an hour"."""
    words = words.strip(" -").rstrip(".") or words
    if unit := UNITS.get(words) or UNITS.get(words.lower()) or _RATES.get(words.lower()):
        return unit
    if len(words) > 60 or not re.search(r"[ /^0-9*.-]", words):
        return None
    words = words.lower()
    if match := re.fullmatch(r"(?:degrees? |°)(c|f)(?:elsius|ahrenheit)?", words):
        return f"degree {match[1].upper()}"
    for pattern, power in _LONG_POWERS:
        words = pattern.sub(power, words)
    powers: dict[str, int] = {}
    for i, part in enumerate(re.split(r"\s*/\s*|\s+(?:per|an?|each|every)\s+", words)):
        for factor in re.split(r"[ *-]+(?![0-9])", part.strip()):
            match = _FACTOR.fullmatch(factor)
            name = UNITS.get(match[1]) or _RATES.get(match[1]) if match else None
            if match is None or name is None:
                return None
            first, _, second = name.partition("/")
            exponent = int(match[2] or 1) * (-1 if i else 1)
            powers[first] = powers.get(first, 0) + exponent
            if second:
                powers[second] = powers.get(second, 0) - exponent
    counted = [_powered(name, power) for name, power in sorted(powers.items()) if power > 0]
    return "/".join([" ".join(counted) or "1", *(_powered(name, -n) for name, n in sorted(powers.items()) if n < 0)])


def _powered(name: str, power: int) -> str:
    return name if power == 1 else f"{name}^{power}"


def units_conflict(a: str | None, b: str | None) -> bool:
    """Whether two quantities carry different units. A unit on one side only is no conflict, nor is one of known kind
    beside one of no known kind; two of those ("?apple", "?slice bread") agree if one names what the other counts."""
    if not a or not b or a == b:
        return False
    if a[0] == "?" == b[0]:
        counted, others = a[1:].split(), b[1:].split()
        return counted[0] not in others and others[0] not in counted
    return "?" not in (a[0], b[0]) and b not in _EITHER.get(a, ()) and a not in _EITHER.get(b, ())
