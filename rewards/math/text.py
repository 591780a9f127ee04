r"""Answers that are text rather than values: choices (A), names, numerals with a base; and one spelling per formula."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:([A-Ja-j])|\(\s*([A-Za-z])\s*\))(?:[.:)]|(?:(?<=\))|[.:)])\s*(?!(?:and|or)\b|[,/&]).*)?", re.DOTALL
)
_BARE_CHOICE = re.compile(r"\(\s*([A-Z])\s*\)|([A-J])|\(\s*([A-J])\s*\)")
_NUMERAL = re.compile(
    r"([+-]?)([0-9A-Z.]+)\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+)|\{\s*\\text\s*\{"
    r"((?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen|bin|oct|dec|hex)[a-z]*)\}\s*\})"
)
_WORDS = re.compile(r"[^\W\d_]+(?:(?: |, |\. |'|-|/| & | - )[^\W\d_]+)*")
_ROMAN = re.compile(r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_SHORT_WORDS = frozenset(("no", "on", "up", "go", "ok", "hi", "he", "we"))
_FORMULA_NAMES = """
    sqrt sin cos tan log exp infinity inf alpha beta gamma delta epsilon zeta theta kappa lambda rho sigma tau phi chi
    psi omega
"""
_FORMULA_WORDS = frozenset(_FORMULA_NAMES.split())


_NOTHING = re.compile(
    r"(?:there (?:is|are|exists?) )?(?:no (?:real )?(?:solutions?|roots?)(?: exists?)?|none)"
    r"|(?:the )?(?:empty|null) set",
    re.IGNORECASE,
)
_RATIO = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:\s*(?::|\\colon\b|\bto\b)\s*[0-9]+(?:\.[0-9]+)?)+")


def plain(text: str) -> str:
    """The text with \\text{...} and its kin opened."""
    for _ in range(3):
        opened = _TEXT.sub(r"\1", text)
        if opened == text:
            break
        text = opened
    return text.strip()


def choice(text: str) -> str | None:
    r"""The letter, if a reference is a choice: A to J, bare or in \text{}, or any capital in parentheses."""
    match = _BARE_CHOICE.fullmatch(plain(text))
    return next(group for group in match.groups() if group) if match else None


def chosen(text: str) -> str | None:
    r"""The letter an answer chooses: A, (A), a), \text{(A)}, "A. 12 cm", "(A) 12 cm"."""
    text = re.sub(r"^(?:option|choice|answer)\s+", "", plain(text), flags=re.IGNORECASE)
    match = _CHOICE.fullmatch(text.strip("*_ "))
    if match is None or re.search(r"\([A-Z]\)|\b[A-J]\)", text[match.end(1) if match[1] else match.end(2) + 1 :]):
        return None  # none, or more than one
    return (match[1] or match[2]).upper()


def words(text: str) -> str | None:
    r"""A name or phrase in one spelling (case, spaces, \text{} and a leading "the" do not matter), or None if the
    text is not made of words. A single letter is a variable."""
    text = plain(text).strip("\"'*_ ")
    if not _WORDS.fullmatch(text) or all(word in _FORMULA_WORDS for word in text.lower().split("/")):
        return None
    if re.fullmatch(r"(?:the )?(?:set of )?(?:(?:all|any|every) )?(?:the )?real(?: number)?s?", text.lower()):
        return None  # an interval
    if not re.search(r"[^\W\d_]{3}", text) and text.lower() not in _SHORT_WORDS:
        return None
    return re.sub(r"^(?:the|a|an) |(?<=^[a-z] )(?:is|are) ", "", " ".join(re.split(r"[ ,-]+", text.lower())))


def roman(text: str) -> str | None:
    """A Roman numeral of more than one letter, or None. In capitals only: iv is a product."""
    text = plain(text).strip("*_. ()")
    return text if len(text) > 1 and _ROMAN.fullmatch(text) else None


def nothing(text: str) -> bool:
    r"""Whether a text says that no value solves the problem: \emptyset, "no solution", "There are no real roots"."""
    return canonical(text) == r"\emptyset" or _NOTHING.fullmatch(plain(text).strip("*_. ")) is not None


def ratio(text: str) -> tuple[Fraction, ...] | None:
    """The terms of 2:4:6, or of "2 to 3"."""
    text = text.strip()
    return tuple(map(Fraction, re.findall(r"[0-9.]+", text))) if _RATIO.fullmatch(text) else None


def same_ratio(a: tuple[Fraction, ...], b: tuple[Fraction, ...]) -> bool:
    """Whether two ratios are proportional. What could be reduced and has minutes, 3:30, is a time, and only itself."""
    if len(a) != len(b):
        return False
    if _is_time(a) or _is_time(b):
        return a == b
    return all(x * b[0] == y * a[0] for x, y in zip(a, b, strict=True)) and any(a) == any(b)


def _is_time(terms: tuple[Fraction, ...]) -> bool:
    whole = all(term.denominator == 1 for term in terms)
    clock = len(terms) == 2 and whole and terms[0] <= 24 and 10 <= terms[1] < 60
    return clock and math.gcd(int(terms[0]), int(terms[1])) > 1


def base_numeral(text: str) -> tuple[str, str] | None:
    """Digits and base of 4210_{5}. The base is part of the answer: 52 is not 52_8, and neither is 42."""
    match = _NUMERAL.fullmatch(text.replace(",", "").strip())
    if match is None or not re.search("[0-9]", match[2]):
        return None
    digits = match[2].lstrip("0") or "0"
    return match[1].replace("+", "") + digits, next(group for group in match.groups()[2:] if group)


def canonical(text: str) -> str:
    """One spelling of a formula: without spaces that mean nothing, braces around single characters and \\text{}."""
    text = re.sub(r"\\\{\s*\\\}|\\varnothing", r"\\emptyset", text)
    text = re.sub(r",\s+(?=[0-9]{3}(?![0-9]))", ";", text)  # "1, 234" is not 1,234
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|rm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(\\[a-zA-Z]+)\s+(?![a-zA-Z])", r"\1", text)
    text = re.sub(r"(?<!\\)\s+", " ", text)
    text = re.sub(r"(?<=[0-9]) (?=[a-zA-Z])", "", text)
    text = re.sub(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])", "", text)
    return re.sub(r"(?<=[\^_])\{([a-zA-Z0-9])\}", r"\1", text)
