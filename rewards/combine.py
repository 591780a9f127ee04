"""A weighted sum of reward functions that reports its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_lora.rewards.score import NotApplicable, RewardFunction, Score, Unscorable


@dataclass(frozen=True)
class Part:
    """One summand. A weight of 0 makes it a metric: reported, and worth nothing."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True)
class WeightedSum:
    """A reward: value = sum of weight * part.

    `parts` of its score hold each part's own value, before its weight; what a part itself reports is kept as
    "part/name". Verdict and answer are those of the first part that has a verdict. One unscorable part, whatever its
    weight, leaves the whole completion unscorable: a verdict that is missing must not look like one. A part that does
    not apply (a batch function's None) is left out of the sum, unless none applies.
    """

    parts: tuple[Part, ...]

    def __call__(self, completion: str, reference: Any = None) -> Score:
        """Raises Unscorable and RewardError as the parts do."""
        from rl_lora.rewards.judging import score  # judging knows sums

        return score(self, completion, reference)

    def combine(self, scores: Sequence[Score | Unscorable]) -> Score | Unscorable:
        """The sum of what the parts say of one completion."""
        total = 0.0
        values: dict[str, float] = {}
        success: bool | None = None
        answer: str | None = None
        missing = [result for result in scores if isinstance(result, Unscorable)]
        for reason in missing:
            if not isinstance(reason, NotApplicable) or len(missing) == len(scores):
                return reason
        for part, result in zip(self.parts, scores, strict=True):
            if isinstance(result, Unscorable):
                continue
            total += part.weight * result.value
            values[part.name] = result.value
            values |= {f"{part.name}/{inner}": value for inner, value in result.parts.items()}
            if success is None:
                success, answer = result.success, result.answer
        return Score(total, values, success, answer)
