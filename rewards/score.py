"""What a reward function returns, and how one is called.

A verifier that could not judge raises `Unscorable`; that is another thing than a wrong answer, and never becomes 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, SupportsFloat


class Unscorable(Exception):
    """The verifier could not judge (it timed out, its worker died). The episode is left out, never scored 0."""


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


RewardFunction = Callable[[str, Any], float | Score]


def name_of(reward: RewardFunction) -> str:
    """How error messages call a reward function: module and name where it has them."""
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    name = getattr(reward, "__qualname__", None)
    return f"{getattr(reward, '__module__', '?')}.{name}" if name else repr(reward)


def score(reward: RewardFunction, completion: str, reference: Any, name: str | None = None) -> Score:
    """Call `reward` and make a `Score` of what it returns.

    Raises Unscorable as the function did, and RewardError, naming the function, for anything else that went wrong.
    """
    name = name or name_of(reward)
    try:
        result = reward(completion, reference)
    except (Unscorable, RewardError):
        raise
    except Exception as error:
        raise RewardError(f"the reward function {name} raised {type(error).__name__}: {error}") from error
    if isinstance(result, Score):
        return result
    if not isinstance(result, SupportsFloat):
        raise RewardError(f"the reward function {name} must return a number or a Score, got {result!r}")
    try:
        return Score(float(result))
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"the reward function {name} must return a finite number, got {result!r}") from error
