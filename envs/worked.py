"""Solutions in steps for generators of reasoning-gym that give bare answers: what a demonstration can show.

One function a generator, from an entry to a text that ends with the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leg_counting(entry: dict[str, Any]) -> str:
    """5 * 14 + 2 * 6 = 70 + 12 = 82: animals times legs, in the question's order."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    counts = [(count, ANIMALS[animal]) for animal, count in entry["metadata"]["animals"].items()]
    products = " + ".join(f"{count} * {legs}" for count, legs in counts)
    return _chain(products, " + ".join(str(count * legs) for count, legs in counts), entry["answer"])


def chain_sum(entry: dict[str, Any]) -> str:
    """57 + 87 - 70 = 144 - 70 = 74: from the left, one operation a step."""
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    total, steps = int(first), [expression]
    while rest:
        sign, term, *rest = rest
        total += int(term) if sign == "+" else -int(term)
        steps.append(" ".join([str(total), *rest]))
    return _chain(*steps)


def _chain(*sides: str) -> str:
    """a = b = c, without a side that only repeats the one before it."""
    return " = ".join(side for i, side in enumerate(sides) if i == 0 or side != sides[i - 1])


WORKED: dict[str, Callable[[dict[str, Any]], str]] = {"chain_sum": chain_sum, "leg_counting": leg_counting}
