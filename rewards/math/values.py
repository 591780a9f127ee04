"""The values of formulas: rational arithmetic stays exact, the rest is mpmath with hundreds of digits.

Runs inside the worker processes only: what takes too long or too much memory is ended there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from rl_lora.rewards.math.formula import TooLarge, Tree, Undefined, variables

MAX_BITS = 20_000
"""An exact number that would take more bits than this becomes a high-precision one."""
MAX_MAGNITUDE = 10_000_000
"""A value beyond 2^+-this is `TooLarge`."""
MAX_FACTORIAL = 100_000

Value = Any  # Fraction, mpf or mpc


def evaluate(tree: Tree, at: Mapping[str, Fraction]) -> Value:
    """The value of a tree where its variables have the values `at`: a Fraction where it is rational in an obvious way,
    else an mpmath number of the current precision. Raises TooLarge and Undefined."""
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "variable":
        return at[parts[0]]
    if kind == "constant":
        return {"pi": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}[parts[0]] * mpmath.mpf(1)
    if kind == "call":
        return _call(parts[0], evaluate(parts[1], at))
    if kind == "derivative":
        name, of = parts
        return _checked(mpmath.diff(lambda value: _inexact(evaluate(of, {**at, name: value})), _inexact(at[name])))
    if kind == "several":
        return _several(parts[0], [evaluate(part, at) for part in parts[1:]])
    values = [evaluate(part, at) for part in parts]
    if kind == "sum":
        total = values[0]
        for value in values[1:]:
            total = _both(total, value, lambda a, b: a + b)
        return total
    if kind == "product":
        total = values[0]
        for value in values[1:]:
            total = _both(total, value, lambda a, b: a * b)
        return total
    if kind == "negative":
        return -values[0]
    if kind == "inverse":
        if values[0] == 0:
            raise Undefined("division by zero")
        return 1 / values[0]
    if kind == "degrees":
        return _inexact(values[0]) * mpmath.pi / 180
    if kind == "power":
        return _power(*values)
    if kind == "root":
        return _root(*values)
    if kind == "factorial":
        return _factorial(values[0])
    assert kind == "binomial"
    return _binomial(*values)


def _inexact(value: Value) -> Value:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _both(a: Value, b: Value, operation: Callable[[Value, Value], Value]) -> Value:
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = _inexact(a), _inexact(b)
    result = operation(a, b)
    if isinstance(result, Fraction) and result.numerator.bit_length() + result.denominator.bit_length() > MAX_BITS:
        return _inexact(result)
    return _checked(result)


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction):
        return value
    if not mpmath.isfinite(value):
        raise Undefined("not a finite number")
    if _magnitude(value) > MAX_MAGNITUDE:
        raise TooLarge
    return value


def _magnitude(value: Value) -> float:
    """|log2 |value||, 0 for 0."""
    if value == 0:
        return 0.0
    if isinstance(value, Fraction):
        return float(abs(value.numerator.bit_length() - value.denominator.bit_length()))
    return abs(float(mpmath.mag(value)))


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        if exponent == 0:
            return Fraction(1)
        raise Undefined("0 to a power that is not positive")
    if _magnitude(exponent) > 64:
        if base == 1 or exponent == 0:
            return Fraction(1)
        raise TooLarge
    size = float(abs(exponent)) * max(1.0, _magnitude(base))
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = float(abs(exponent)) * (base.numerator.bit_length() + base.denominator.bit_length())
        if bits <= MAX_BITS or abs(base) == 1:
            return base ** int(exponent)
    if size > MAX_MAGNITUDE:
        raise TooLarge
    return _checked(mpmath.power(_inexact(base), _inexact(exponent)))


def _root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 10_000:
        return _power(value, 1 / degree if degree else Fraction(0))
    n = int(degree)
    value = _inexact(value)
    if n % 2 and not isinstance(value, mpmath.mpc) and value < 0:
        return -mpmath.root(-value, n)  # the real root
    return _checked(mpmath.sqrt(value) if n == 2 else mpmath.power(value, mpmath.mpf(1) / n))


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise Undefined("factorial of a negative number")
        if value <= 1000:
            return Fraction(int(mpmath.libmp.ifac(int(value))))
    if isinstance(value, mpmath.mpc) or abs(value) > MAX_FACTORIAL:
        raise TooLarge
    return _checked(mpmath.factorial(_inexact(value)))


def _binomial(n: Value, k: Value) -> Value:
    if not all(isinstance(x, Fraction) for x in (n, k)):
        raise Undefined("binomial of something other than rational numbers")
    if k.denominator != 1 and max(abs(n), abs(k)) < 1000:
        return _checked(mpmath.binomial(_inexact(n), _inexact(k)))
    if k.denominator != 1:
        raise Undefined("binomial of huge fractions")
    if n.denominator != 1 and 0 <= k <= 10:  # a polynomial in n, looked at anywhere
        return math.prod((Fraction(n - j, j + 1) for j in range(int(k))), start=Fraction(1))
    if n.denominator != 1:
        raise Undefined("binomial of a fraction")
    if k < 0 or 0 <= n < k:
        return Fraction(0)
    if abs(n) > 10_000 or k > 10_000:
        raise TooLarge
    result = Fraction(1)
    for j in range(int(min(k, n - k) if n >= 0 else k)):
        result = result * (n - j) / (j + 1)
    return result


def _several(name: str, values: list[Value]) -> Value:
    if not all(isinstance(value, Fraction) for value in values):
        raise Undefined(f"{name} of irrational numbers")
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(value.denominator != 1 for value in values):
        raise Undefined(f"{name} of fractions")
    return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(value) for value in values)))


_CALLS: dict[str, Callable[[Value], Value]] = {
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tan": mpmath.tan,
    "cot": mpmath.cot,
    "sec": mpmath.sec,
    "csc": mpmath.csc,
    "sinh": mpmath.sinh,
    "cosh": mpmath.cosh,
    "tanh": mpmath.tanh,
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    "arccot": mpmath.acot,
    "asin": mpmath.asin,
    "acos": mpmath.acos,
    "atan": mpmath.atan,
    "ln": mpmath.ln,
    "log": mpmath.ln,
    "lg": mpmath.log10,
    "exp": mpmath.exp,
    "cis": mpmath.expj,
    "conj": mpmath.conj,
}


def _call(name: str, value: Value) -> Value:
    if name == "abs":
        return abs(value)
    if name in ("floor", "ceil"):
        if isinstance(value, Fraction):
            return Fraction(value.__floor__() if name == "floor" else value.__ceil__())
        return mpmath.floor(value) if name == "floor" else mpmath.ceil(value)
    if _magnitude(value) > (24 if name in ("exp", "sinh", "cosh") else 4096) and value != 0 and abs(value) > 1:
        if name in ("ln", "log", "lg", "arctan", "atan", "tanh"):
            return _CALLS[name](_inexact(value))
        raise TooLarge
    try:
        return _checked(_CALLS[name](_inexact(value)))
    except (ValueError, ZeroDivisionError) as error:
        raise Undefined(f"{name} has no value there") from error


DIGITS = (120, 240)
"""Both precisions at which irrational values are compared."""


def same_value(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same value for all values of their variables.

    Without variables: exactly for rational values; for others, whether the difference vanishes as the precision grows
    from 120 to 240 digits. With variables: the same at random rational points, all positive ones first. Points where
    a value is not real decide only if no point is real, so sqrt(1/n) = 1/sqrt(n), while |x| is not x.

    A bare \\log counts as natural or as decimal, whichever makes them equal.

    Raises TooLarge; and Undefined if a tree has no value anywhere it was looked at.
    """
    decimal = _decimal_logs(a), _decimal_logs(b)
    if decimal != (a, b):
        return _same_value(a, b) or _same_value(*decimal)
    return _same_value(a, b)


def _decimal_logs(tree: Tree) -> Tree:
    parts = (_decimal_logs(part) if isinstance(part, tuple) else part for part in tree)
    return ("call", "lg", *list(parts)[2:]) if tree[:2] == ("call", "log") else tuple(parts)


def _same_value(a: Tree, b: Tree) -> bool:
    names = sorted(variables(a) | variables(b))
    if not names:
        return _same_at(a, b, {})[0]
    draw = random.Random(0)  # the same points every time: a verdict is reproducible
    real = other = 0
    all_same = True
    for point in range(20):
        spread = (1, 3, 10, 50)[point % 4]
        at = {}
        for name in names:
            at[name] = Fraction(draw.randrange(1, 1000 * spread), draw.choice((997, 991, 983)))
            if point >= 8:
                at[name] *= draw.choice((1, -1))
        try:
            same, is_real = _same_at(a, b, at)
        except (Undefined, TooLarge):
            continue
        if is_real:
            real += 1
            if not same:
                return False
        elif min(at.values()) > 0:
            other += 1
            all_same &= same
    if real >= 2:
        return True
    if other:
        return all_same
    raise Undefined("no value at any point")


def _same_at(a: Tree, b: Tree, at: Mapping[str, Fraction]) -> tuple[bool, bool]:
    """Whether two values agree at a point, and whether both are real there."""
    differences = []
    for digits in DIGITS:
        with mpmath.workdps(digits):
            x, y = evaluate(a, at), evaluate(b, at)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return x == y, True
            x, y = _inexact(x), _inexact(y)
            scale = max(abs(x), abs(y))
            differences.append(abs(x - y))
            is_real = all(abs(mpmath.im(value)) <= scale * mpmath.mpf(10) ** (-digits // 2) for value in (x, y))
            if (
                digits == DIGITS[0]
                and differences[0] > scale * mpmath.mpf(10) ** -60
                and differences[0] > mpmath.mpf(10) ** -60
            ):
                return False, is_real
    with mpmath.workdps(30):
        first, second = differences
        ten = mpmath.mpf(10)
        return bool(second == 0 or second <= scale * ten**-225 or second <= first * ten**-80), is_real
