r"""The grammar of formulas: LaTeX (`\frac{1}{2}\sqrt{3}`), plain text (`sqrt(3)/2`, `2*x**2`) and mixtures.

It builds a tree itself: nothing is handed to Python's or sympy's parsers. What it cannot read raises `Unreadable`;
sums, integrals and the like are left to Math-Verify.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rl_lora.rewards.math.formula import MAX_DEPTH, TooLarge, Tree, Unreadable, has_i, variables
from rl_lora.rewards.math.tokens import CLOSING, CONSTANTS, FUNCTIONS, GREEK, OF_SEVERAL, STYLES, VARIANTS, Tokens


def read(text: str) -> Tree:
    """The tree of a cleaned formula. Raises Unreadable and TooLarge."""
    try:
        return _Reader(text).whole()
    except RecursionError as error:
        raise TooLarge("nested too deep") from error


class _Reader(Tokens):
    """Recursive descent over tokens. Precedence: sum < product (also implied) < sign < power < factorial."""

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
        closing = CLOSING[opening]
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
        if token in CLOSING:
            return self.group()
        if token in ("|", r"\lvert"):
            return self._bars("|" if token == "|" else r"\rvert")
        if kind not in ("word", "command"):
            raise Unreadable(f"{token!r} is out of place" if token else "it ends too early")
        self.at += 1
        name = token.lstrip("\\")
        if name == "sqrt":
            return self._root(plain=kind == "word")
        if name in FUNCTIONS:
            return self._function(name)
        if name in OF_SEVERAL:
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
        if name in STYLES:
            return self._styled()
        if name in GREEK or name in ("pi", "imath"):
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
            if name in OF_SEVERAL:
                return self._of_several(name)
            return self._function(name) if name in FUNCTIONS else self._named(name)
        raise Unreadable("text in a formula")

    def _named(self, name: str) -> Tree:
        name = VARIANTS.get(name, name)
        if self.take("_"):
            wrapped = self.peek().lstrip("\\") in STYLES and self.tokens[self.at + 1 : self.at + 2] == ["{"]
            if self.peek() == "{" or wrapped:
                index = self._index()
            elif self.peek():
                index = self.next().lstrip("\\")
            else:
                raise Unreadable("it ends too early")
            name = f"{name}_{index}"
        while self.take("'"):
            name += "'"
        return CONSTANTS.get(name, ("variable", name))

    def _index(self) -> str:
        r"""The index in x_{12}, p_{\\text{max}} and p_\\text{max}, without its dress."""
        depth, index = 0, ""
        while self.at < len(self.tokens):
            token = self.next()
            depth += {"{": 1, "}": -1}.get(token, 0)
            if token not in ("{", "}") and token.lstrip("\\") not in STYLES:
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
        if variables(tree) or not has_i(tree):
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
            self._starts_operand() and self.peek().lstrip("\\") not in FUNCTIONS and self.peek() not in ("(", "|", "[")
        ):
            factors.append(self.power())
        if self.peek() == "/" and self.kinds[self.at + 1 : self.at + 2] == ["number"] and factors[-1][0] == "constant":
            self.at += 1  # \sin \pi/3
            factors.append(("inverse", self.power()))
        tree = factors[0] if len(factors) == 1 else ("product", *factors)
        return ("negative", tree) if negative else tree
