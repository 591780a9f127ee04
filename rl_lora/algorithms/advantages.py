"""Rewards of a group -> one advantage an episode. A few lines each, with its source.

An advantage takes the rewards of a group and returns the advantages of its episodes, float64 (G,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lora.algorithms.registry import Record, Registry

if TYPE_CHECKING:  # arithmetic is done by the arrays themselves
    import numpy as np


@dataclass(frozen=True)
class Advantage(Record):
    """An advantage, and what it asks of a group."""

    compares: bool = True
    """Whether it compares the episodes of a group: then equal rewards teach nothing, and a group needs two episodes.
    Without, a group teaches nothing where all rewards are 0."""


def advantage(name: str = "", **properties: Any) -> Callable[[Callable[..., np.ndarray]], Advantage]:
    """Make a function the record of an advantage."""
    return lambda function: Advantage(function, name, **properties)


@advantage("mean")
def mean_baseline(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the group: A_i = R_i - mean(R).

    "LoRA Without Regret", Schulman et al. 2025.
    """
    return rewards_G - rewards_G.mean()


@advantage("standardized")
def standardized(rewards_G: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the group, divided by the group's deviation: A_i = (R_i - mean(R)) / std(R).

    GRPO: DeepSeekMath, arXiv:2402.03300, section 4.1.
    """
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-6)


@advantage("none", compares=False)
def raw(rewards_G: np.ndarray) -> np.ndarray:
    """Bare reward, without a baseline: A_i = R_i.

    REINFORCE: Williams 1992.
    """
    return rewards_G


ADVANTAGES = Registry("advantage", Advantage, mean_baseline, standardized, raw)
"""All that a name can stand for, in the order of the help."""
