"""The bounds that a field declares beside its type, such as `Annotated[int, Ge(1)]`: checked, and in words.

A text among the annotations says why the bound is there, a `Unit` what is counted.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from math import inf
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, Unit

SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
WORDS = {">=": "at least", ">": "above", "<=": "at most", "<": "below"}


class Bounds(NamedTuple):
    """The numbers that a field takes."""

    limits: dict[str, float]
    """By sign, as in {">=": 0, "<": 1}; "<" infinity: finite numbers only."""
    is_whole: bool
    unit: str
    reason: str

    def admit(self, number: float) -> bool:
        """Whether a number is within the limits. NaN never is."""
        return all(HOLDS[sign](number, limit) for sign, limit in self.limits.items())

    @property
    def rule(self) -> str:
        """For messages: ">= 1", "in 0 ... 2999", "in [0, 1)", "> 0 and finite"."""
        ends = self._ends()
        text = " and ".join(f"{sign} {limit}" for sign, limit in ends.items())
        if len(ends) == 2:
            (low_sign, low), (high_sign, high) = ends.items()
            text = f"in {'[' if low_sign == '>=' else '('}{low}, {high}{']' if high_sign == '<=' else ')'}"
            text = f"in {low} ... {high}" if self.is_whole and set(ends) == {">=", "<="} else text
        text += " and finite" if inf in self.limits.values() else ""
        return text + (f" ({self.unit})" if self.unit else "") + (f": {self.reason}" if self.reason else "")

    @property
    def words(self) -> str:
        """For help: "at least 1", "0 to 1", "at least 0 and below 1"."""
        ends = self._ends()
        if set(ends) == {">=", "<="}:
            return f"{ends['>=']} to {ends['<=']}"
        return " and ".join(f"{WORDS[sign]} {limit}" for sign, limit in ends.items())

    def _ends(self) -> dict[str, float]:
        return {sign: limit for sign, limit in self.limits.items() if limit != inf}


def bounds_of(hint: Any) -> Bounds | None:
    """The first bounds in a type, also inside of a union or a list."""
    if get_origin(hint) is not Annotated:
        return next((found for each in get_args(hint) if (found := bounds_of(each))), None)
    notes = hint.__metadata__
    limits = {SIGNS[type(note)]: dataclasses.astuple(note)[0] for note in notes if type(note) in SIGNS}
    if not limits:
        return None
    return Bounds(
        limits,
        is_whole=hint.__origin__ is int,
        unit=next((note.unit for note in notes if isinstance(note, Unit)), ""),
        reason=next((note for note in notes if isinstance(note, str)), ""),
    )


def bounded(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds]]:
    """Dotted names, numbers and bounds of all that has bounds in a (nested) config; None is no number."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from bounded(value, f"{prefix}{field.name}.")
        elif bounds := bounds_of(hints[field.name]):
            if isinstance(value, list | tuple):
                yield from ((f"{prefix}{field.name}[{i}]", each, bounds) for i, each in enumerate(value))
            elif value is not None:
                yield prefix + field.name, value, bounds


def out_of_bounds(config: Any) -> list[str]:
    """A message for each number that its field does not take: "rollout.max_turns must be >= 1, got 0"."""
    return [
        f"{name} must be {bounds.rule}, got {number}"
        for name, number, bounds in bounded(config)
        if not bounds.admit(number)
    ]
