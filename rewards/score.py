"""What a reward function returns, and what it may know: a problem, and replies to it.

A verifier that could not judge raises `Unscorable`; that is another thing than a wrong answer, and never becomes 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

RewardFunction = Callable[..., Any]
"""See `rl_lora.rewards.signature`: its parameters say what it is called with."""
Messages = list[dict[str, Any]]
"""A conversation: [{"role": "user", "content": "..."}, ...]."""


class Unscorable(Exception):
    """The verifier could not judge (it timed out, its worker died). The episode is left out, never scored 0."""


class NotApplicable(Unscorable):
    """A batch function returned None for a completion: in a sum, the others decide alone."""


class RewardError(ValueError):
    """A reward function failed, or returned something that is not a finite number or a `Score`."""


@dataclass(frozen=True)
class Score:
    """A reward with more to say than its number.

    `value` is what is learned from. `parts` are named numbers to report. `success` is the verdict (solved or not),
    apart from the possibly shaped value; `None` where there is none. `answer` is what was judged, in one spelling, so
    that equal answers are equal texts: votes are counted by it. Raises ValueError unless every number is finite.
    """

    value: float
    parts: dict[str, float] = field(default_factory=dict)
    success: bool | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        for name, number in {"value": self.value, **self.parts}.items():
            try:
                finite = math.isfinite(number)
            except (TypeError, ValueError, OverflowError) as error:  # None, a text, a tensor of two
                raise ValueError(f"a score must be a finite number, got {name} = {number!r:.200}") from error
            if not finite:
                raise ValueError(f"a score must be finite, got {name} = {number}")
        if self.success not in (None, True, False):  # "False" is true to Python
            raise ValueError(f"success must be True, False or None, got {self.success!r:.200}")


@dataclass(frozen=True)
class Case:
    """What a reward function may know of a problem. `prompt` is what was asked: a text, or messages; `record` is the
    row of the data that the problem was made of."""

    reference: Any = None
    prompt: str | Messages = ""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A completion, and its tokens where they are known."""

    text: str
    token_ids: tuple[int, ...] | None = None


def is_built_in(reward: RewardFunction) -> bool:
    """Whether a reward function is one of this package."""
    return f"{getattr(reward, '__module__', '')}.".startswith(f"{__package__}.")


def name_of(reward: RewardFunction) -> str:
    """How error messages call a reward function: module and name, of an object those of its class."""
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    name = getattr(reward, "__qualname__", None)
    return f"{getattr(reward, '__module__', '?')}.{name}" if name else name_of(type(reward))


def as_score(result: Any, name: str) -> Score:
    """What the reward function `name` returned for one completion, as a Score. Raises RewardError if it is neither a
    Score nor a finite number."""
    if isinstance(result, Score):
        return result
    if result is None:
        raise RewardError(
            f"the reward function {name} must return a number or a Score, got None; a function that cannot judge "
            "a completion raises rewards.Unscorable"
        )
    if getattr(result, "size", None) == 1 and callable(getattr(result, "item", None)):
        result = result.item()  # an array of one number
    if not isinstance(result, SupportsFloat) or isinstance(result, complex):
        raise RewardError(f"the reward function {name} must return a number or a Score, got {result!r}")
    try:
        return Score(float(result))
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"the reward function {name} must return a finite number, got {result!r}") from error
