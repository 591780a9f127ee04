"""A weighted sum of reward functions that reports its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards.score import RewardFunction, Score, score


@dataclass(frozen=True)
class Part:
    """One summand. A weight of 0 makes it a metric: reported, and worth nothing."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True)
class WeightedSum:
    """A reward function: value = sum of weight * part.

    `parts` of its score hold each part's own value, before its weight; what a part itself reports is kept as
    "part/name". Verdict and answer are those of the first part that has a verdict. One unscorable part, whatever its
    weight, leaves the whole completion unscorable: a verdict that is missing must not look like one.
    """

    parts: tuple[Part, ...]

    def __call__(self, completion: str, reference: Any) -> Score:
        """Raises Unscorable and RewardError as the parts do."""
        total = 0.0
        values: dict[str, float] = {}
        success: bool | None = None
        answer: str | None = None
        for part in self.parts:
            result = score(part.function, completion, reference, part.name)
            total += part.weight * result.value
            values[part.name] = result.value
            values |= {f"{part.name}/{inner}": value for inner, value in result.parts.items()}
            if success is None:
                success, answer = result.success, result.answer
        return Score(total, values, success, answer)
