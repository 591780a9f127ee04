"""Rewards of a group -> one advantage an episode. A few lines an estimator, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rl_lora.types import Group


def mean_baseline(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = R_i - mean(R): the group's mean as the baseline ("LoRA Without Regret", Schulman et al. 2025)."""
    return rewards_G - rewards_G.mean()


def standardized(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = (R_i - mean(R)) / std(R) (GRPO: DeepSeekMath, arXiv:2402.03300, section 4.1)."""
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-6)


def raw(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = R_i: no baseline (REINFORCE: Williams 1992)."""
    return rewards_G


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": mean_baseline,
    "standardized": standardized,
    "none": raw,
}


def advantages(group: Group, estimator: str) -> np.ndarray | None:
    """float64 (G,), or None where the group has no signal: every advantage would be zero.

    Equal rewards are compared, not subtracted: the rounding of a mean must not become a gradient.
    """
    rewards_G = np.array([episode.reward for episode in group.episodes], dtype=np.float64)
    silent = not rewards_G.any() if estimator == "none" else (rewards_G == rewards_G[:1]).all()
    return None if silent else ADVANTAGES[estimator](rewards_G)


def shuffle_rewards(groups: list[Group], rng: np.random.Generator) -> list[Group]:
    """Deal the rewards of all episodes out anew: a control in which there is nothing to learn."""
    rewards = rng.permutation([episode.reward for group in groups for episode in group.episodes]).tolist()
    deal = iter(rewards)
    return [
        replace(group, episodes=tuple(replace(episode, reward=next(deal)) for episode in group.episodes))
        for group in groups
    ]
