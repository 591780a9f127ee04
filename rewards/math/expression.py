r"""A small grammar of formulas and their exact or high-precision values.

Reads what people and models write for one value: LaTeX (`\frac{1}{2}\sqrt{3}`), plain text (`sqrt(3)/2`, `2*x**2`) and
mixtures. It builds a tree and evaluates the tree itself: rational arithmetic stays exact, the rest is mpmath with
hundreds of digits. Nothing is handed to Python's or sympy's parsers. What it cannot read raises `Unreadable`; sums,
integrals and the like are left to Math-Verify. Runs inside the worker processes only.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 20_000
"""An exact number that would take more bits than this becomes a high-precision one."""
MAX_MAGNITUDE = 10_000_000
"""A value beyond 2^+-this is `TooLarge`."""
MAX_FACTORIAL = 100_000
MAX_DEPTH = 60
"""Brackets, braces and exponents may be nested this deep."""

Tree = tuple[Any, ...]
Value = Any  # Fraction, mpf or mpc


class Unreadable(Exception):
    """The text is not a formula of this grammar."""


class TooLarge(Exception):
    """A tower of powers, the factorial of something huge, brackets beyond `MAX_DEPTH`: refused for good."""


class Undefined(Exception):
    """Division by zero and the like."""


# ---- reading ----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?![eE][-+]?[0-9])"
    r"|(?P<command>\\(?:[a-zA-Z]+|[{}|%$]))|(?P<word>[a-zA-Z]+)|(?P<operator>\*\*|[-+*/^_(){}\[\]|!',:]))"
)
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot asin acos atan ln log lg exp abs floor ceil cis"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_OF_SEVERAL = frozenset(("gcd", "lcm", "max", "min"))
_NAMES = {"pi": ("constant", "pi"), "e": ("constant", "e"), "i": ("constant", "i"), "imath": ("constant", "i")}
_GREEK_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar varrho varsigma
"""
_VARIANTS = {"varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "varrho": "rho"}
_GREEK = frozenset(_GREEK_NAMES.split())
_SPELLED_GREEK = frozenset(name for name in _GREEK if len(name) > 2 and name != "ell")
_OPEN_CLOSE = {"(": ")", "{": "}", "[": "]"}
_STYLE_NAMES = """
    mathrm mathbf mathit mathsf mathbb text textbf textit boldsymbol operatorname vec hat mathcal mathfrak mathscr tilde
    texttt
"""
_STYLES = frozenset(_STYLE_NAMES.split())


_SHORT_WORDS = "for not and are all any the but per has was its yes out off non via let nor when where with"
_WORDS = frozenset(_SHORT_WORDS.split())


def _is_word(letters: str, behind: str) -> bool:
    """Whether letters are a short word rather than factors: those of "7t for t > 0", or of "5 of 0" before a number."""
    before_number = 2 <= len(letters) <= 3 and re.match(r"\s+[0-9]", behind)
    return letters in _WORDS or (bool(before_number) and letters not in _FUNCTIONS and letters not in ("pi", "mod"))


def read(text: str) -> Tree:
    """The tree of a cleaned formula. Raises Unreadable and TooLarge."""
    try:
        return _Reader(text).whole()
    except RecursionError as error:
        raise TooLarge("nested too deep") from error


class _Reader:
    """Recursive descent over tokens. Precedence: sum < product (also implied) < sign < power < factorial."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.kinds: list[str] = []
        position = 0
        text = text.rstrip()
        if r"\vec" in text and r"\times" in text:
            raise Unreadable("a product of vectors")
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise Unreadable(f"{text[position]!r} is not part of a formula")
            kind = str(match.lastgroup)
            if kind == "word" and _is_word(match["word"], text[match.end() :]):
                raise Unreadable(f"{match['word']!r} is a word")
            self._add(kind, match[kind])
            position = match.end()
        self.at = 0
        self.depth = 0
        self.bars = 0

    def _add(self, kind: str, token: str) -> None:
        if kind != "word" or token in _FUNCTIONS | _OF_SEVERAL or token in ("pi", "sqrt") or token in _SPELLED_GREEK:
            self.tokens.append(token)
            self.kinds.append(kind)
        elif (
            match := None if self._in_index() else re.match(r"sqrt|pi|arcsin|arccos|arctan|sin|cos|tan|ln|log", token)
        ):  # "pir", "sinx"
            self._add("word", match[0])
            self._add("word", token[match.end() :])
        elif (
            match := None if self._in_index() else re.search(r"(?:sqrt|sin|cos|tan|ln|log|pi)$", token)
        ):  # "xsin", "rpi"
            self._add("word", token[: match.start()])
            self._add("word", match[0])
        elif self._in_index():
            self.tokens.append(token)
            self.kinds.append(kind)
        elif len(token) > 3:
            raise Unreadable(f"{token!r} is a word")
        else:
            self.tokens.extend(token)
            self.kinds.extend("word" for _ in token)

    def _in_index(self) -> bool:
        r"""Whether a word is the index of a name: the end of T_{\text{hot}}, v_\text{max} or v_{max}."""
        ahead = [token.lstrip("\\") for token in self.tokens[-4:]]
        while len(ahead) > 1 and (ahead[-1] == "{" or ahead[-1] in _STYLES):
            ahead.pop()
        return bool(self.tokens) and self.tokens[-1] == "{" and ahead[-1:] == ["_"]

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.kinds[self.at] if self.at < len(self.kinds) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, *tokens: str) -> bool:
        if self.peek() in tokens:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"expected {token!r}, got {self.peek()!r}")

    def whole(self) -> Tree:
        if not self.tokens:
            raise Unreadable("empty")
        tree = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(f"{self.peek()!r} is out of place")
        return tree

    def nested(self, parse: Callable[[], Tree]) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("nested too deep")
        tree = parse()
        self.depth -= 1
        return tree

    def sum(self) -> Tree:
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            minus = self.next() == "-"
            term = self.product()
            terms.append(("negative", term) if minus else term)
        return terms[0] if len(terms) == 1 else ("sum", *terms)

    def product(self) -> Tree:
        factors = [self.signed()]
        while True:
            if self.take("*", r"\cdot", r"\times", r"\ast"):
                factors.append(self.signed())
            elif self.take("/", r"\div", ":"):
                factors.append(("inverse", self.signed()))
            elif self._mixed_number():
                factors[-1] = ("sum", factors[-1], self.power())
            elif self._starts_operand():
                if self.kind() == "number" and self.kinds[self.at - 1] == "number" and factors[-1][0] != "power":
                    raise Unreadable("two numbers side by side")
                factors.append(self.power())
            else:
                return factors[0] if len(factors) == 1 else ("product", *factors)

    def _mixed_number(self) -> bool:
        """Whether the tokens are at the fraction of `2\\frac{1}{2}`."""
        ahead = "".join(self.tokens[self.at : self.at + 7])
        before = self.at > 0 and self.kinds[self.at - 1] == "number" and self.tokens[self.at - 1].isdigit()
        alone = self.at < 2 or self.tokens[self.at - 2] in ("+", "-", "(", "{", "|")
        return before and alone and bool(re.match(r"\\frac(?:\{[0-9]+\}|[0-9](?=\{|[0-9]))(?:\{[0-9]+\}|[0-9])", ahead))

    def _starts_operand(self) -> bool:
        token = self.peek()
        if token == "|":
            return self.bars == 0
        return (
            self.kind() in ("number", "word")
            or token in ("(", "{", "[")
            or (
                self.kind() == "command"
                and token not in (r"\}", r"\|", r"\rfloor", r"\rceil", r"\rvert", r"\right", r"\%")
            )
        )

    def signed(self) -> Tree:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.next() == "-"
        tree = self.power()
        return ("negative", tree) if negative else tree

    def power(self) -> Tree:
        base = self.postfix()
        if not self.take("^", "**"):
            return base
        if self.take(r"\circ"):
            return ("degrees", base)
        if self.peek() == "{" and self.tokens[self.at + 1 : self.at + 3] == [r"\circ", "}"]:
            self.at += 3
            return ("degrees", base)
        tree = ("power", base, self.nested(self._exponent))
        return ("factorial", tree) if self.take("!") else tree

    def _exponent(self) -> Tree:
        if self.peek() in ("+", "-"):
            sign = self.next()
            tree = self._exponent()
            return ("negative", tree) if sign == "-" else tree
        if self.peek() == "{":
            return self.group()
        return self.nested(self.power)

    def postfix(self) -> Tree:
        tree = self.nested(self.primary)
        if self.take("!"):
            if self.peek() == "!":
                raise TooLarge("a double factorial")
            return ("factorial", tree)
        return tree

    def group(self) -> Tree:
        """What stands in one pair of brackets. (Bars do not reach across it.)"""
        opening = self.next()
        closing = _OPEN_CLOSE[opening]
        bars, self.bars = self.bars, 0
        tree = self.nested(self.sum)
        self.expect(closing)
        self.bars = bars
        return tree

    def argument(self) -> Tree:
        r"""The argument of \frac or \sqrt: a group or, as in \frac34, one digit or letter."""
        if self.peek() in ("{",) or (self.peek() == "(" and self.tokens[self.at - 1] == r"\sqrt"):
            return self.group()
        if self.kind() == "number":
            number = self.tokens[self.at]
            if len(number) > 1 and number.isdigit():
                self.tokens[self.at] = number[1:]
                return ("number", Fraction(number[0]))
            return self.primary()
        if self.kind() in ("word", "command"):
            return self.nested(self.primary)
        raise Unreadable("an argument is missing")

    def primary(self) -> Tree:
        kind, token = self.kind(), self.peek()
        if kind == "number":
            self.at += 1
            if self.peek() == "_":
                raise Unreadable("a numeral with a base")
            return ("number", Fraction(token.replace(",", "")))
        if token in _OPEN_CLOSE:
            return self.group()
        if token in ("|", r"\lvert"):
            return self._bars("|" if token == "|" else r"\rvert")
        if kind not in ("word", "command"):
            raise Unreadable(f"{token!r} is out of place" if token else "it ends too early")
        self.at += 1
        name = token.lstrip("\\")
        if name == "sqrt":
            return self._root(plain=kind == "word")
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _OF_SEVERAL:
            return self._of_several(name)
        if kind == "word":
            return self._chosen(name) if self._is_combination(name) else self._named(name)
        if name == "frac" and re.fullmatch(r"\{d\}\{d[a-zA-Z]\}", "".join(self.tokens[self.at : self.at + 7])):
            return self._derivative()
        if name == "overline":
            return self._conjugate()
        if name in ("frac", "binom", "dbinom", "tbinom"):
            first, second = self.argument(), self.argument()
            return ("product", first, ("inverse", second)) if name == "frac" else ("binomial", first, second)
        if name in ("lfloor", "lceil"):
            tree = self.nested(self.sum)
            self.expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            return ("call", "floor" if name == "lfloor" else "ceil", tree)
        if name in _STYLES:
            return self._styled()
        if name in _GREEK or name in ("pi", "imath"):
            return self._named(name)
        raise Unreadable(f"{token} is not known here")

    def _is_combination(self, name: str) -> bool:
        """Whether the tokens are at the brackets of C(6,2)."""
        ahead = self.tokens[self.at : self.at + 5]
        numbers = (
            name == "C" or [self.kinds[i] for i in (self.at + 1, self.at + 3) if i < len(self.kinds)] == ["number"] * 2
        )
        return name in ("C", "P") and numbers and "".join(ahead[:1] + ahead[2:3] + ahead[4:]) == "(,)"

    def _chosen(self, name: str) -> Tree:
        """C(6,2), or the arrangements P(6,2)."""
        self.at += 1
        first = self.nested(self.sum)
        self.expect(",")
        second = self.nested(self.sum)
        self.expect(")")
        chosen = ("binomial", first, second)
        return chosen if name == "C" else ("product", chosen, ("factorial", second))

    def _bars(self, closing: str) -> Tree:
        self.at += 1
        self.bars += 1
        tree = self.nested(self.sum)
        self.expect(closing)
        self.bars -= 1
        return ("call", "abs", tree)

    def _styled(self) -> Tree:
        r"""One letter in \mathrm{...} or \text{...}, or behind \vec; a word there is no formula."""
        if self.kind() == "word" and len(self.peek()) == 1:
            return self._named(self.next())
        if (
            self.peek() == "{"
            and self.kinds[self.at + 1 : self.at + 2] == ["word"]
            and self.tokens[self.at + 2 : self.at + 3] == ["}"]
        ):
            name = self.tokens[self.at + 1]
            self.at += 3
            if name in _OF_SEVERAL:
                return self._of_several(name)
            return self._function(name) if name in _FUNCTIONS else self._named(name)
        raise Unreadable("text in a formula")

    def _named(self, name: str) -> Tree:
        name = _VARIANTS.get(name, name)
        if self.take("_"):
            wrapped = self.peek().lstrip("\\") in _STYLES and self.tokens[self.at + 1 : self.at + 2] == ["{"]
            if self.peek() == "{" or wrapped:
                index = self._index()
            elif self.peek():
                index = self.next().lstrip("\\")
            else:
                raise Unreadable("it ends too early")
            name = f"{name}_{index}"
        while self.take("'"):
            name += "'"
        return _NAMES.get(name, ("variable", name))

    def _index(self) -> str:
        r"""The index in x_{12}, p_{\\text{max}} and p_\\text{max}, without its dress."""
        depth, index = 0, ""
        while self.at < len(self.tokens):
            token = self.next()
            depth += {"{": 1, "}": -1}.get(token, 0)
            if token not in ("{", "}") and token.lstrip("\\") not in _STYLES:
                index += token.lstrip("\\")
            if token == "}" and depth == 0:
                return index
        raise Unreadable("an index without its end")

    def _derivative(self) -> Tree:
        r"""What stands behind \\frac{d}{dx}; the tokens are at "{ d } { d x }"."""
        name = self.tokens[self.at + 5]
        self.at += 7
        factors = [self.power()]
        while self._starts_operand():
            factors.append(self.power())
        return ("derivative", name, factors[0] if len(factors) == 1 else ("product", *factors))

    def _conjugate(self) -> Tree:
        """A number under a bar; over a variable it may mean anything."""
        tree = self.group() if self.peek() == "{" else ("variable", "")
        if variables(tree) or not _has_i(tree):
            raise Unreadable("a bar over no complex number")
        return ("call", "conj", tree)

    def _root(self, plain: bool) -> Tree:
        degree: Tree = ("number", Fraction(2))
        if self.peek() == "[":
            degree = self.group()
        if self.peek() == "(":
            return ("root", self.group(), degree)
        if self.peek() == "{":
            return ("root", self.group(), degree)
        if plain and self.kind() == "number":
            return ("root", self.primary(), degree)
        return ("root", self.argument(), degree)

    def _of_several(self, name: str) -> Tree:
        closing = {"(": ")", r"\{": r"\}"}.get(self.next() if self.peek() else "")
        if closing is None:
            raise Unreadable(f"{name} of what?")
        arguments = [self.nested(self.sum)]
        while self.take(","):
            arguments.append(self.nested(self.sum))
        self.expect(closing)
        return ("several", name, *arguments)

    def _function(self, name: str) -> Tree:
        power: Tree | None = None
        base: Tree | None = None
        for _ in range(2):
            if self.take("_"):
                base = self.argument()
            elif self.take("^"):
                power = self._exponent() if self.peek() in ("{", "-") else self.argument()
        if power == ("negative", ("number", Fraction(1))) and name in ("sin", "cos", "tan", "cot"):
            name, power = f"arc{name}", None
        argument = self._function_argument()
        tree: Tree
        if name == "log" and base is not None:
            tree = ("product", ("call", "ln", argument), ("inverse", ("call", "ln", base)))
        elif base is not None:
            raise Unreadable(f"{name} has no base")
        else:
            tree = ("call", name, argument)
        return tree if power is None else ("power", tree, power)

    def _function_argument(self) -> Tree:
        r"""(x), {x} or, as in \sin 2x \cos x, the factors up to the next sign, operator or function."""
        if self.peek() in ("(", "{", "["):
            tree = self.group()
            return ("factorial", tree) if self.take("!") else tree
        negative = self.take("-")
        factors = [self.power()]
        while (
            self._starts_operand() and self.peek().lstrip("\\") not in _FUNCTIONS and self.peek() not in ("(", "|", "[")
        ):
            factors.append(self.power())
        if self.peek() == "/" and self.kinds[self.at + 1 : self.at + 2] == ["number"] and factors[-1][0] == "constant":
            self.at += 1  # \sin \pi/3
            factors.append(("inverse", self.power()))
        tree = factors[0] if len(factors) == 1 else ("product", *factors)
        return ("negative", tree) if negative else tree


def variables(tree: Tree) -> frozenset[str]:
    """The names of a tree's variables."""
    if tree[0] == "variable":
        return frozenset([tree[1]])
    if tree[0] == "derivative":
        return variables(tree[2]) | {tree[1]}
    return frozenset().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))


def _has_i(tree: Tree) -> bool:
    return tree == ("constant", "i") or any(_has_i(part) for part in tree if isinstance(part, tuple))


# ---- values -----------------------------------------------------------------------------------------------------


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


# ---- equality ---------------------------------------------------------------------------------------------------

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
