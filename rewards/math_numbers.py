"""Plain numbers with their units, read exactly: integers, decimals, fractions, mixed numbers, percentages.

The fast path of the math verifier. No sympy, no floats, no evaluation; the work is bounded by the caps below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math_words import digits

MAX_DIGITS = 1000
"""A number with more digits than this is not read."""
MAX_EXPONENT = 1000
"""A power of ten beyond this is not read."""

# Typography on the left, what it means on the right. Digits of other scripts are deliberately absent.
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{FIGURE DASH}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{ZERO WIDTH SPACE}": "",
        "×": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "∙": r"\cdot ",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
        "√": "sqrt ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}",
        "⅛": r"\frac{1}{8}",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    }
)
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu"}
_GREEK |= {"ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega", "π": "pi"}
_CHARACTERS |= str.maketrans({letter: rf"\{name} " for letter, name in _GREEK.items()})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")

# What changes only how a formula looks.
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|displaystyle|textstyle|limits|thinspace)(?![a-zA-Z])|~")
_THOUSANDS_SPACE = re.compile(r"(?<![0-9.])([0-9]{1,3})((?:(?:\\,|\\ |\{\\,\}|~| )[0-9]{3})+)(?![0-9/])")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])")
_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
# What a number may be dressed in; a currency in front and "million" behind it.
_COLOR = re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]*\}|\\(?:underline|bm|boldsymbol)(?=\s*\{)")
_DRESSED = re.compile(r"\\(?:mathbf|mathrm|mathit|mathsf|text|textbf)\s*\{\s*([-+]?[0-9][0-9.,/]*)\s*\}")
_WORDED = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{\s*((?:(?:hundred|thousand|million|billion|trillion)\b[a-z ]*|Rs\.?|USD|\\?\$))\s*\}"
)
_OVER = re.compile(r"\{([^{}]*)\}\s*\\over(?![a-z])\s*\{([^{}]*)\}|\{([^{}]*?)\s*\\over(?![a-z])\s*([^{}]*)\}")
_CHOOSE = re.compile(r"\{([^{}]*?)\s*\\choose(?![a-zA-Z])\s*([^{}]*)\}")
_LEADING = re.compile(r"^(?:\\approx(?![a-z])|\\sim(?![a-z])|\\equiv(?![a-z])|=)\s*")
_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ("*", "*"),
)


def clean(text: str) -> str:
    """The text without what changes only its looks: delimiters, markdown, spacing and sizing commands, a full stop."""
    text = text.translate(_CHARACTERS)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # escaped once too often; in a matrix it ends a row
    text = _strip_delimiters(re.sub(r"\\!\s*", "", text))
    text = re.sub(r"(?<!\\)\$([^$]+)(?<!\\)\$", r" \1 ", text)  # "$125$ miles"
    text = _THOUSANDS_SPACE.sub(lambda n: n[1] + re.sub(r"[^0-9]", "", n[2]), text)
    text = _SPACING.sub(" ", _WORDED.sub(r" \1 ", _DRESSED.sub(r"\1", _COLOR.sub("", text))))
    text = _SIZING.sub("", _FRACTION_COMMAND.sub(r"\\frac", text))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _OVER.sub(r"\\frac{\1\3}{\2\4}", text))
    text = re.sub(r"\s*\{\s*,\s*\}\s*", ",", text).replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    return digits(_strip_delimiters(text))


def _strip_delimiters(text: str) -> str:
    """Take off pairs of delimiters around the whole text, and what a sentence leaves behind a number."""
    while True:
        before = text
        text = _LEADING.sub("", text.strip().rstrip(".,;:")).strip()
        if text.endswith("\\") and not text.endswith("\\\\"):  # what is left of a "\\ " at the end
            text = text[:-1].rstrip()
        if wrapped := _WRAPPED.fullmatch(text):
            text = wrapped[1]
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            enclosed = text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing)
            if (
                enclosed
                and opening not in inner.replace(r"\$", "")
                and closing not in inner.replace(r"\$", "")
                and not inner.endswith("\\")
            ):
                text = inner
        if text == before:
            return text


# ---- units ------------------------------------------------------------------------------------------------------

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
_CURRENCY = {
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
_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

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
        return text[: match.start()].rstrip(), _CURRENCY[match[1]]
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
        and not parts & set(_MULTIPLIERS)
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
    return len(parts) <= 6 and len(parts[0]) > 2 and not _NO_UNITS & set(parts) and not set(parts) & set(_MULTIPLIERS)


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


# ---- numbers ----------------------------------------------------------------------------------------------------


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


_GROUPED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{_GROUPED}(?:\.[0-9]*)?|\.[0-9]+)"
_SIGNED = rf"[+-]?\s*{DECIMAL}"
_ARGUMENT = rf"(?:\{{\s*({_SIGNED})\s*\}}|\s*([0-9]))"
_FRAC = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_MIXED_FRAC = re.compile(rf"([0-9]+)\s*{_FRAC.pattern}")
_SLASH = re.compile(rf"\(?\s*({_SIGNED})\s*\)?\s*/\s*\(?\s*({_SIGNED})\s*\)?")
_MIXED_SLASH = re.compile(r"([0-9]+)(?:\s+|\s*\+\s*(?=[0-9]+\s*/))([0-9]+)\s*/\s*([0-9]+)")
_SCIENTIFIC = re.compile(
    rf"({DECIMAL})\s*(?:[eE]([+-]?[0-9]+)"
    r"|(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([+-]?[0-9]+)))"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([0-9]+))")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{?\s*([0-9]+)\s*\}?")
_DECIMAL = re.compile(DECIMAL)


def quantity(text: str) -> Quantity | None:
    """The number with its unit that a cleaned text is, or None if it is anything else (or beyond the caps)."""
    stem, unit = split_unit(text)
    if unit == "%":  # "50\% \text{ of them}" has two
        stem = stem.rstrip()
    elif unit == "":
        inner, second = split_unit(stem)
        if second in ("%", "degree"):
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
    words = stem.rsplit(None, 1)
    if len(words) == 2 and words[1].lower() in _MULTIPLIERS:
        return words[0].rstrip(), _MULTIPLIERS[words[1].lower()]
    return stem, 1


def _prefix(stem: str) -> tuple[int, str, str | None]:
    """Sign, rest and currency of "-$5", "$-5", "+5"."""
    sign, currency = 1, None
    for _ in range(3):
        stem = stem.lstrip()
        for mark, unit in _CURRENCY.items():
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
    if match := _REPEATING.fullmatch(text):
        whole, fixed, repeated = match[1] or "0", match[2], match[3]
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
