"""Units and other words behind a number: what is taken off, what is kept to be compared, and what is neither."""

from __future__ import annotations

import re

from rl_lora.rewards.math.nouns import noun_phrase
from rl_lora.rewards.math.unit_names import CAPITALS, CURRENCY, MULTIPLIERS, UNITS, known_unit

_CONNECTIVES = frozenset(
    ("and", "or", "to", "not", "times", "plus", "minus", "over", "mod", "than", "squared", "cubed")
)
_CONNECTIVES |= {"half", "halves", "third", "thirds", "tenth", "tenths", "hundredths", "thousandths", "factorial"}

_TEXT = r"\\(?:text|mbox|textrm|textit|textbf|textnormal|mathrm|mathit|hbox|rm|operatorname)\s*"
_WRAPPED_UNIT = re.compile(_TEXT + r"\{([^{}]*)\}\s*(?:\^\s*\{?([0-9])\}?)?$")
_WRAPPER = re.compile(_TEXT + r"\{((?:[^{}]|\{[^{}]*\})*)\}")
_DEGREES = re.compile(
    r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)\s*(?:(?:\\(?:text|mathrm|rm)\s*\{?\s*)?([CF])\}?)?$"
)
_UNIT_FRACTION = re.compile(r"\}\s*/\s*\\(?:text|mathrm|mbox)\s*\{")
_STACKED = re.compile(
    rf"\\frac\s*\{{\s*{_TEXT}\{{([^{{}}]*)\}}\s*\}}\s*\{{\s*{_TEXT}\{{([^{{}}]*)\}}\s*(\^\s*[0-9])?\s*\}}$"
)
_TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc|cis")
_CURRENCY_BEHIND = re.compile(r"(?<=[0-9 ])(\\\$|\$|€|£|₹|¥|₩|₽|¢)$")
_PERCENT = re.compile(r"\\?%$")
_PLAIN_UNIT = re.compile(r"(?<![A-Za-z\\_^])([A-Za-z¢][A-Za-z .'/-]*)(?:\^\s*\{?([0-9])\}?)?$")
_BARE_NUMBER = re.compile(r"[-+]?[0-9][0-9.,/]*")
_NUMBER_STEM = re.compile(
    r"(?:[^\W\d_]*[$€£₹¥₩₽]|(?:Rs\.?|USD)\s)?"
    r"(?:[-+0-9.,/{}^*\s€£₹]|\\(?:frac|times|cdot|overline|bar|dot|\$)(?![a-zA-Z])|\((?=[-+\s]*[0-9.])|(?<=[0-9])\))*"
)


_ONLY_WORDS = re.compile(r"[A-Za-z .,'()/-]*")
_FACTOR_FIRST = re.compile(r"[a-zA-Z]\s*\\")  # 2x \text{ dollars}
_REMARK = re.compile(r"(?<=[A-Za-z])\s*\([A-Za-z ]+\)$")


def split_unit(text: str) -> tuple[str, str | None]:
    """A cleaned text and the unit that stands behind it, in one spelling: "cm^2" of `15\\mbox{ cm}^2`.

    None where nothing was taken off. Words of no known kind give "?" and their nouns without endings, the first the
    one that is counted ("?slice bread" of "14 slices of bread"), or "" where they name nothing ("16 left"). A plain
    single letter, as in 5x, stays: it may be a variable. (Behind a space, `5 m`, it may be a unit.)
    """
    if _BARE_NUMBER.fullmatch(text):
        return text, None
    text = _STACKED.sub(r" \\text{\1/\2\3}", _UNIT_FRACTION.sub("/", text))
    if (match := _CURRENCY_BEHIND.search(text)) and text[: match.start()].strip():
        return text[: match.start()].rstrip(), CURRENCY.get(match[1], "cent")
    if match := _PERCENT.search(text):
        return text[: match.start()].rstrip(), "%"
    if (match := _DEGREES.search(text)) and text[: match.start()].strip() and not _TRIGONOMETRIC.search(text):
        return text[: match.start()].rstrip(), f"degree {match[1]}" if match[1] else "degree"
    head = _NUMBER_STEM.match(text)
    if head and head.end() < len(text) and re.search(r"[0-9]\)?\}?[\s-]*$", head[0]):
        if (said := _behind_number(head[0], text[head.end() :])) is not None:
            return said
        if _ONLY_WORDS.fullmatch(_opened(text[head.end() :])) and not _FACTOR_FIRST.match(text, head.end()):
            return text, None
    if (match := _WRAPPED_UNIT.search(text)) and text[: match.start()].strip(" {}"):
        words = match[1].strip()
        unit = _unit(words, match[2]) if _is_wrapped_unit(words) else None
        return (text, None) if unit is None else (text[: match.start()].rstrip(), unit)
    if match := _PLAIN_UNIT.search(text):
        stem, words = text[: match.start()], match[1].strip()
        # Behind a formula only a longer word that is known to be a unit: the h of "2\\pi r h" is a variable.
        if stem.strip() and stem.endswith(" ") and re.search("[A-Za-z¢]{2}", words) and known_unit(words) is not None:
            return stem.rstrip(" -"), _unit(words, match[2])
    return text, None


def _behind_number(stem: str, rest: str) -> tuple[str, str | None] | None:
    """The number and the unit, where all that stands behind a number says of what it is so many."""
    if percent := re.match(r"\\?%", rest):
        more = _behind_number(f"{stem} ", rest[percent.end() :].strip())
        return (stem.strip(), "%") if more else None
    ordinal = re.match(r"(?:st|nd|rd|th)(?![A-Za-z])", rest)
    if ordinal and stem[-1:].isdigit():
        rest = rest[ordinal.end() :].strip()
        return _behind_number(f"{stem} ", rest) if rest else (stem.strip(), "")
    if inner := re.fullmatch(r"\(([^()]*)\)", rest.strip()):
        name = _opened(inner[1])
        if name in CURRENCY:
            return stem.strip(), CURRENCY[name]
        single = len(name) == 1 and not stem.endswith(" ") and r"\text" not in inner[1]
        unit = None if single else _said(name, wrapped=True)
        return None if unit is None else (stem.strip(), unit)
    wrapped = rest.startswith("\\")
    said = _opened(rest)
    scale = re.match(r"(?:(?:doz(?:ens?)?|hundred|thousand|million|billion|trillion)\b\s*)+", said, re.IGNORECASE)
    if scale:
        if scale.end() == len(said):
            return None
        stem, said = f"{stem.rstrip()} {scale[0]}", said[scale.end() :]
    gap = wrapped or stem[-1:] in (" ", "-") or re.match(r"[a-z]{5,}(?![a-z])", rest) is not None
    unit = _said(said, wrapped=wrapped) if gap else known_unit(said) if len(said) > 1 else None
    return None if unit is None else (stem.rstrip(" -"), unit)


def _opened(text: str) -> str:
    r"""The words of \text{ m s}^{-1}."""
    text = _WRAPPER.sub(r" \1 ", text).replace(r"\cdot", " ").replace(r"\rm", " ")
    return " ".join(re.sub(r"\s*([/^])\s*", r"\1", text).split())


def _said(words: str, *, wrapped: bool) -> str | None:
    """The unit that words behind a number name, "?..." or "" where they name another thing; None where they change
    the value, or are a formula."""
    if wrapped and words in CAPITALS:
        return CAPITALS[words]
    if inner := re.fullmatch(r"\(([^()]*)\)", words):
        words = inner[1].strip()
    words = _REMARK.sub("", words)
    known = known_unit(words)
    return known if known is not None else noun_phrase(words)


def _is_wrapped_unit(words: str) -> bool:
    """Whether words in \\text{} say of what a number is so many: not a letter (4\\mathrm{i}), not " or 6"."""
    parts = set(re.split(r"[^a-z]+", words.lower()))
    plain = not words or re.fullmatch(r"[A-Za-z .,'/()\\%-]*(?:\^\s*\{?[0-9]\}?)?", words) is not None
    return (
        plain
        and (len(words) != 1 or words.lower() in UNITS)
        and not parts & _CONNECTIVES
        and not parts & set(MULTIPLIERS)
    )


def _unit(words: str, power: str | None) -> str | None:
    """The one spelling of a unit behind a formula; None for words that are no unit."""
    if not words:
        return ""
    return known_unit(f"{words}^{power}" if power else words) or _said(words, wrapped=True)
