"""The advantages of a group's episodes, and the control in which they say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rl_lora.algorithms.advantages import ADVANTAGES
from rl_lora.types import Group


def advantages(group: Group, name: str) -> np.ndarray | None:
    """float64 (G,), or None where the group has no signal: every advantage would be zero.

    Equal rewards are compared, not subtracted: the rounding of a mean must not become a gradient.
    """
    advantage = ADVANTAGES[name]
    rewards_G = np.array([episode.reward for episode in group.episodes], dtype=np.float64)
    silent = (rewards_G == rewards_G[:1]).all() if advantage.compares else not rewards_G.any()
    return None if silent else np.asarray(advantage(rewards_G), dtype=np.float64)


def shuffle_rewards(groups: list[Group], rng: np.random.Generator) -> list[Group]:
    """Deal the rewards of all episodes out anew: a control in which there is nothing to learn."""
    rewards = rng.permutation([episode.reward for group in groups for episode in group.episodes]).tolist()
    deal = iter(rewards)
    return [
        replace(group, episodes=tuple(replace(episode, reward=next(deal)) for episode in group.episodes))
        for group in groups
    ]
