r"""Equations and inequalities: their sides, the name before an equals sign, an inequality as an interval.

Reads only, but for `proportional`, which says whether two equations are multiples of each other.
"""

from __future__ import annotations

import re

from rl_lora.rewards.math.formula import Tree, variables
from rl_lora.rewards.math.lists import is_bare_list, items_of, top_level
from rl_lora.rewards.math.names import is_name
from rl_lora.rewards.math.values import same_value

EQUALS = r"(?<![<>!:\\])=(?!=)"
NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\s*\([a-zA-Z, ]+\))?|[A-Za-z]{1,2}")
_NAMES = re.compile(r"\(\s*[a-zA-Z]\s*(?:,\s*\\?[a-zA-Z]+\s*)+\)")
LESS = r"\\leq?(?:slant)?(?![a-zA-Z])|<=|<|\\lt(?![a-zA-Z])"
MORE = r"\\geq?(?:slant)?(?![a-zA-Z])|>=|>|\\gt(?![a-zA-Z])"


def assigned(text: str) -> tuple[str | None, str]:
    if is_bare_list(text):
        return None, text
    member = re.fullmatch(r"(.*?)\\in(?![a-zA-Z])(.*)", text, re.DOTALL)
    if member and NAME.fullmatch(member[1].strip()):
        return member[1].strip(), member[2].strip()
    sides = top_level(text, EQUALS)
    if len(sides) > 1 and all(sides) and (is_name(sides[0]) or _NAMES.fullmatch(sides[0])):
        if _NAMES.fullmatch(sides[0]):
            return _in_order(sides[0], sides[-1])
        return sides[0], sides[-1]
    return None, text


def _in_order(names: str, values: str) -> tuple[str, str]:
    """(y, x) = (3, 7) as (x, y) = (7, 3)."""
    order, (kind, items) = [name.strip() for name in names[1:-1].split(",")], items_of(values)
    if kind != "()" or len(items) != len(order) or not all(re.fullmatch("[a-zA-Z]", name) for name in order):
        return names, values
    pairs = sorted(zip(order, items, strict=True))
    return f"({', '.join(name for name, _ in pairs)})", f"({', '.join(item for _, item in pairs)})"


def is_equation(text: str) -> bool:
    return len(top_level(text, EQUALS)) > 1 and not is_bare_list(text)


BIG = re.compile(r"\\(?:sum|prod|i+nt|oint|lim(?:sup|inf)?|det|begin)(?![a-zA-Z])")
"""Operators beside whose value Math-Verify does not look at the other side of a relation."""
UNEQUAL = r"\\(?:neq?|approx|equiv|sim|cong|propto|simeq)(?![a-zA-Z])"
SIGNS = dict.fromkeys(("<", ">", r"\lt", r"\gt"), "<") | {r"\ne": r"\neq"}
SIGNS |= dict.fromkeys((r"\le", r"\leq", r"\leqslant", "<=", r"\ge", r"\geq", r"\geqslant", ">="), "<=")


def proportional(a: Tree, b: Tree) -> bool:
    """Whether a = c b for a constant c that is not 0."""
    renamed = {name: f"{name}*" for name in variables(b)}
    if variables(a) != variables(b) or not renamed:
        return False
    cross = same_value(("product", a, _rename(b, renamed)), ("product", _rename(a, renamed), b))
    zero = ("number", 0)
    return cross and same_value(a, zero) == same_value(b, zero)


def _rename(tree: Tree, names: dict[str, str]) -> Tree:
    if tree[0] == "variable":
        return ("variable", names[tree[1]])
    return tuple(_rename(part, names) if isinstance(part, tuple) else part for part in tree)


def is_inequality(text: str) -> bool:
    return len(top_level(text, rf"{LESS}|{MORE}")) > 1


_BUILDER = re.compile(r"\\\{\s*(\\?[a-zA-Z]+)(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\||\\vert)\s*(.*\1.*)\\\}")


def as_interval(text: str) -> str:
    r"""An inequality for one name, also in \{x : x > 2\}, as an interval; any other text as it is."""
    if match := _BUILDER.fullmatch(text):
        text = match[2].strip()
    relation = rf"({LESS}|{MORE})"
    if match := re.fullmatch(rf"(.+?){relation}(.+?){relation}(.+)", text):
        low, first, name, second, high = (part.strip() for part in match.groups())
        if not NAME.fullmatch(name) or bool(re.fullmatch(LESS, first)) != bool(re.fullmatch(LESS, second)):
            return text
        if re.fullmatch(MORE, first):
            low, first, second, high = high, second, first, low
        return f"{'(' if _is_strict(first) else '['}{low},{high}{')' if _is_strict(second) else ']'}"
    if match := re.fullmatch(rf"(.+?){relation}(.+)", text):
        left, sign, right = (part.strip() for part in match.groups())
        less = re.fullmatch(LESS, sign) is not None
        if NAME.fullmatch(right) and not NAME.fullmatch(left):
            left, right, less = right, left, not less
        if not NAME.fullmatch(left) or "," in right:
            return text
        if less:
            return rf"(-\infty,{right}{')' if _is_strict(sign) else ']'}"
        return rf"{'(' if _is_strict(sign) else '['}{right},\infty)"
    return text


def _is_strict(sign: str) -> bool:
    return sign in ("<", ">", r"\lt", r"\gt")


def united(text: str) -> list[str]:
    r"""The parts of A \cup B, or of "x < 1 or x > 2"."""
    kind, items = items_of(text)
    both = re.search(r"(?<![a-zA-Z\\])and(?![a-zA-Z])", text)
    if kind == "" and len(items) > 1 and not both and all(is_inequality(item) for item in items):
        return items
    return top_level(text, r"\\cup(?![a-zA-Z])")
