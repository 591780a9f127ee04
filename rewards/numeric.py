"""Numeric match: is the last number of the completion the reference number, exactly?

Plain numbers only. Fractions, percentages, units and LaTeX need a mathematics verifier. Nothing is evaluated, and the
work is bounded whatever the text.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from numbers import Integral
from typing import Any

from rl_lora.rewards.score import Score

MAX_CHARS = 4096
"""Only this many characters at the end of a text are looked at."""

MAX_PLAIN_DIGITS = 50
"""Numbers beyond 10^50 are spelled with an exponent."""

SIGNS = "-+\N{MINUS SIGN}"  # the hyphen first: these also stand in character classes
# 1234, 1,234, 12.5, .5, 1e3: digits are ASCII digits; "1,23" is two numbers.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?!\d)|[0-9]+)"
UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![.\d])\.[0-9]+)(?:[eE][{SIGNS}]?[0-9]+)?"

_PLAIN = re.compile(rf"\s*([{SIGNS}]?)({UNSIGNED})\s*")
# "3/4" is one token, so that its 4 is not taken for an answer; a digit of another script next to a token spoils it.
_TOKEN = re.compile(rf"(?<!\d){UNSIGNED}(?:/{UNSIGNED})*(?!\d)")


def numeric_match(completion: str, reference: Any = None, *, strict: bool = False) -> Score:
    """1.0 and success if the last number of `completion` equals `reference`, else 0.0.

    The comparison is exact (085 = 85.0 = 85; 0.1 is not 0.10000001). A text without a number, or whose last number
    is a fraction such as 3/4, scores 0.0. Only the last 4,096 characters are looked at.

    Args:
        completion: what the model wrote.
        reference: an int, a finite float or a text with one number; of a text with "####", what stands behind it.
        strict: the completion must be nothing but the number (white space around it apart).

    Raises:
        ValueError: the reference is not one number.
    """
    expected = _reference_number(reference)
    found = _only_number(completion) if strict else last_number(completion)
    correct = found is not None and found == expected
    return Score(float(correct), success=correct, answer=None if found is None else _spelled(found))


def _spelled(number: Decimal) -> str:
    """One text for equal numbers: 85 for 085 and 85.0, never longer than it was written."""
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    if not text:
        return "0"
    stripped = text.rstrip("0")
    number = Decimal((sign, tuple(map(int, stripped)), int(exponent) + len(text) - len(stripped)))
    return format(number, "f") if abs(number.adjusted()) < MAX_PLAIN_DIGITS else str(number)


def last_number(text: str) -> Decimal | None:
    """The last number that `text` (its last 4,096 characters) holds, or None."""
    tokens = _tokens(text)
    return _value(tokens[-1]) if tokens else None


def _tokens(text: str) -> list[re.Match[str]]:
    """The numbers in a text, in order."""
    tail = text[-MAX_CHARS:]
    if len(text) > MAX_CHARS:  # the cut may have halved a number
        tail = tail.lstrip("0123456789.,/eE" + SIGNS)
    return list(_TOKEN.finditer(tail))


def _value(token: re.Match[str]) -> Decimal | None:
    return _decimal(_negative(token), token.group())


def _negative(token: re.Match[str]) -> bool:
    """Whether the signs right before a number make it negative: -5, +-5 and 5--3 do; 5-3 and --5 do not."""
    before = token.string[: token.start()]
    stem = before.rstrip(SIGNS)
    signs = before[len(stem) :]
    if signs and stem and (stem[-1].isalnum() or stem[-1] in ")]"):
        signs = signs[1:]  # a binary operator, or a hyphen
    return (len(signs) - signs.count("+")) % 2 == 1


def _decimal(negative: bool, digits: str) -> Decimal | None:
    """The exact value of a match of `UNSIGNED`; None for a fraction and for an exponent beyond Decimal's range."""
    try:
        number = Decimal(digits.replace(",", "").replace("\N{MINUS SIGN}", "-"))
    except InvalidOperation:
        return None
    return number.copy_negate() if negative else number  # unary minus would round


def _only_number(text: str) -> Decimal | None:
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_CHARS else None
    return _decimal(match[1] not in ("", "+"), match[2]) if match else None


def check_reference(reference: Any) -> None:
    """Raises ValueError unless `reference` is one number."""
    _reference_number(reference)


def _reference_number(reference: Any) -> Decimal:
    number: Decimal | None = None
    if isinstance(reference, str):
        tokens = _tokens(reference.rpartition("####")[2])
        number = _value(tokens[0]) if len(tokens) == 1 else None
    elif isinstance(reference, Integral) and not isinstance(reference, bool):
        number = Decimal(int(reference))
    elif isinstance(reference, float):
        number = Decimal(repr(float(reference)))  # the decimal that was written, not its binary neighbour
    elif isinstance(reference, Decimal):
        number = reference
    if number is None or not number.is_finite():
        shown = repr(reference) if len(repr(reference)) <= 200 else f"{repr(reference)[:200]}..."
        raise ValueError(f"the numeric reward needs one number as reference (72, '72', '... #### 72'), got {shown}")
    return number
