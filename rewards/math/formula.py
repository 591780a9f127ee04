"""Formulas as trees, and the ways in which one cannot be read or has no value."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 60
"""Brackets, braces and exponents may be nested this deep."""

Tree = tuple[Any, ...]
"""The kind of a node, and its parts."""


class Unreadable(Exception):
    """The text is not a formula of this grammar."""


class TooLarge(Exception):
    """A tower of powers, the factorial of something huge, brackets beyond `MAX_DEPTH`: refused for good."""


class Undefined(Exception):
    """Division by zero and the like."""


def variables(tree: Tree) -> frozenset[str]:
    """The names of a tree's variables."""
    if tree[0] == "variable":
        return frozenset([tree[1]])
    if tree[0] == "derivative":
        return variables(tree[2]) | {tree[1]}
    return frozenset().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))


def has_i(tree: Tree) -> bool:
    return tree == ("constant", "i") or any(has_i(part) for part in tree if isinstance(part, tuple))
