"""Single values: by the grammar of formulas where it reads them, else by Math-Verify.

Runs inside the worker processes only: it imports mpmath, sympy and the LaTeX parser.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

from rl_lora.rewards.math.formula import TooLarge, Tree, Undefined, Unreadable, variables
from rl_lora.rewards.math.lists import top_level
from rl_lora.rewards.math.numbers import quantity
from rl_lora.rewards.math.reader import read
from rl_lora.rewards.math.relations import BIG
from rl_lora.rewards.math.text import canonical
from rl_lora.rewards.math.units import split_unit
from rl_lora.rewards.math.values import evaluate, same_value


class UnreadableReference(Exception):
    """Neither this module nor Math-Verify can read the reference."""


def warm_up() -> None:
    """Import and build once what the first item would otherwise pay for."""
    logging.disable(logging.CRITICAL)
    _evaluate_no_text()
    if not _ask_math_verify(r"\int_0^1 x dx", r"\frac{1}{2}", True):
        raise RuntimeError("Math-Verify does not work here: it cannot integrate x from 0 to 1")


def _evaluate_no_text() -> None:
    """Replace sympy's reader of Python expressions, which ends in `eval`, by a reader of numerals.

    sympy hands it any text that stands where a number should. Math-Verify's LaTeX grammar uses it for numerals only
    (which now also stay exact: 0.1 is 1/10); whatever else might find a way there is refused.
    """
    import math_verify.parser
    import sympy
    from latex2sympy2_extended import latex2sympy2
    from sympy.parsing import sympy_parser

    def numeral(text: object, *_: object, **__: object) -> Any:
        if (
            not isinstance(text, str)
            or len(text) > 1000
            or not re.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", text)
        ):
            raise sympy.SympifyError(text)
        return sympy.Rational(Fraction(text))

    for module in (sympy_parser, sympy.parsing, latex2sympy2, math_verify.parser):
        module.parse_expr = numeral


def without_unit(text: str) -> tuple[str, str | None]:
    stem, unit = split_unit(text)
    if unit is None:
        stem = re.sub(r"^(?:\\\$|[$€£])\s*", "", text)
        return stem, "$" if stem != text else None
    return stem, unit


def rounds_to(exact: str, decimal: str) -> bool:
    """Whether a decimal is what a value rounds to at its last place (or is cut to)."""
    rounded = quantity(decimal)
    tree = read_value(without_unit(exact)[0])
    if rounded is None or tree is None or variables(tree):
        return False
    try:
        value = evaluate(tree, {})
        if isinstance(value, Fraction):
            value = mpmath.mpf(value.numerator) / value.denominator
        difference = value - mpmath.mpf(rounded.value.numerator) / rounded.value.denominator
    except (TooLarge, Undefined):
        return False
    places = len(re.sub(r"[^0-9.].*", "", decimal.lstrip("-")).partition(".")[2])
    last_place = mpmath.mpf(10) ** -places
    cut = -difference if rounded.value < 0 else difference
    return bool(abs(difference) <= last_place / 2 or 0 <= cut < last_place)


_INFINITE = re.compile(r"([+-]?)\s*(?:\\infty|\\infinity|infinity|inf|oo)")


def same_scalar(answer: str, reference: str) -> bool:
    infinite, expected_infinite = _INFINITE.fullmatch(answer), _INFINITE.fullmatch(reference)
    if infinite or expected_infinite:
        return bool(infinite and expected_infinite and (infinite[1] == "-") == (expected_infinite[1] == "-"))
    try:
        expected = read_value(reference)
    except TooLarge as error:
        raise UnreadableReference(reference) from error
    found = read_value(answer)
    if expected is None or found is None:
        return same_by_math_verify(answer, reference, reference_read=expected is not None)
    try:
        return same_value(found, expected)
    except (TooLarge, Undefined):
        pass
    try:
        same_value(expected, expected)
    except (TooLarge, Undefined) as error:
        raise UnreadableReference(reference) from error
    return False  # a tower of powers is nobody's other way of writing a value


def read_value(text: str) -> Tree | None:
    plain = quantity(text)
    if plain is not None and plain.unit is None:
        return ("number", plain.value)  # also 2e5, which might be a product
    try:
        return read(text)
    except Unreadable:
        return None


_ITS_OWN = re.compile(
    r"<|>|\\(?:sum|prod|int|iint|oint|lim|cap|cup|setminus|mathbb|in|notin|subset|subseteq|le|leq|ge|geq|lt|gt|ne|neq"
    r"|det|begin|bmod|pmod|mod|mid|equiv|partial|prime|overline|approx|log|bar|dots|ldots|cdots)(?![a-zA-Z])"
)
"""What Math-Verify reads and the grammar of values does not; for anything else it is not asked."""
_HEAVY = re.compile(r"[0-9]{6,}|[0-9]{4,}\s*[!}]|\)\s*!|!\s*!|[0-9)}]\s*\^\s*\{?\s*[0-9]{3,}|10\s*\^|\^\s*\{[^{}]*\^")
"""Numerals that make sympy work for minutes; in an answer to a plain reference they are refused beforehand."""
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{4,}")


def same_by_math_verify(answer: str, reference: str, *, reference_read: bool = False) -> bool:
    """Math-Verify's verdict, through its LaTeX grammar only: its reader of plain expressions ends in `eval`.

    Its own time-outs are off (they need the main thread and its signals); the worker's deadline holds. What it calls
    equal because two numbers are close is checked again with 60 digits.
    """
    if not (_ITS_OWN.search(answer) or _ITS_OWN.search(reference)):
        if reference_read:
            return False
        raise UnreadableReference(reference)
    if reference_read and _HEAVY.search(answer):
        return False
    try:
        return _ask_math_verify(answer, reference, reference_read)
    except (MemoryError, UnreadableReference):
        raise
    except Exception:  # sympy raises what it likes, TypeErrors over two equations among them
        return False


def _ask_math_verify(answer: str, reference: str, reference_read: bool) -> bool:
    expected = _parse(reference)
    if not expected and not reference_read:
        raise UnreadableReference(reference)
    found = _parse(answer)
    if not expected or not found:
        return False
    import math_verify

    equal: Callable[..., bool] = math_verify.verify
    if not equal(expected, found, timeout_seconds=None, numeric_precision=60, float_rounding=15):
        return False
    return not _refuted(expected[0], found[0])


def _parse(text: str) -> list[Any]:
    import math_verify

    if _WORD.search(re.sub(r"\\[a-zA-Z]+\{[^{}]*\}|\\[a-zA-Z]+", "", text)):
        return []  # its grammar reads a word as a product of letters, in any order
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    parsed: list[Any] = math_verify.parse(
        f"${text}$",
        [config],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed


def _refuted(a: Any, b: Any) -> bool:
    """Whether two sympy numbers differ in their first 60 digits."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and not value.free_symbols for value in (a, b)):
        return False
    x, y = (sympy.N(value, 80) for value in (a, b))
    if not (x.is_number and y.is_number):
        return False
    scale = max(abs(x), abs(y))
    return bool(abs(x - y) > scale * sympy.Float(10, 80) ** -60)


_BOUND = re.compile(
    r"(\\(?:sum|prod|i*nt)(?:\s*[_^]\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\w|\\infty))*)(?![a-zA-Z])(.+)", re.DOTALL
)


def same_terms(answer: str, reference: str) -> bool | None:
    """Sums of the same terms with their factors in another order."""
    a, b = _BOUND.fullmatch(answer), _BOUND.fullmatch(reference)
    if a is None or b is None or canonical(a[1]) != canonical(b[1]):
        return None
    if BIG.search(a[2] + b[2]) or any(len(top_level(body[2].lstrip(" -"), r"[-+=<>]")) > 1 for body in (a, b)):
        return None
    trees = read_value(a[2]), read_value(b[2])
    try:
        return (trees[0] is not None and trees[1] is not None and same_value(trees[0], trees[1])) or None
    except (TooLarge, Undefined):
        return None
