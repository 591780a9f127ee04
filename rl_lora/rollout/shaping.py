"""Rewards for the length of replies in tokens, which an environment, which sees text, does not know.

In training they are added to the environment's reward and reported as parts of it, "overlong" and "brevity", before
their weight; a weight of 0 only reports. The verdict is never touched, and evaluation knows nothing of them.
"""

from __future__ import annotations

from dataclasses import replace

from rl_lora.config import RolloutConfig
from rl_lora.types import Group


def shaped(group: Group, config: RolloutConfig) -> Group:
    """The group with the parts that `config` asks for.

    Raises:
        ValueError: brevity is asked for where the environment gives no verdict.
    """
    parts: list[tuple[str, float, list[float]]] = []
    if config.overlong_tokens:
        n = config.max_tokens, config.overlong_tokens
        penalties = [sum(overlong(len(t.completion_ids), *n) for t in e.turns) for e in group.episodes]
        parts.append(("overlong", config.overlong_weight, penalties))
    if config.brevity_weight is not None:
        parts.append(("brevity", config.brevity_weight, brevity(group)))
    for name, weight, values in parts:
        episodes = tuple(
            replace(
                episode,
                reward=episode.reward + weight * value,
                reward_parts={**episode.reward_parts, name: value},
            )
            for episode, value in zip(group.episodes, values, strict=True)
        )
        group = replace(group, episodes=episodes)
    return group


def overlong(n_tokens: int, max_tokens: int, margin: int) -> float:
    """The soft punishment of a reply of n tokens: 0 up to `max_tokens - margin`, falling linearly to -1 at
    `max_tokens`, where it is cut off (DAPO, arXiv:2503.14476, equation 13; margin is its L_cache)."""
    return -min(1.0, max(0.0, (n_tokens - (max_tokens - margin)) / margin))


def brevity(group: Group) -> list[float]:
    """The length reward of Kimi k1.5 (arXiv:2501.12599, section 2.3.3), one number an episode.

    l = 0.5 - (n - min n) / (max n - min n) over the tokens n of the group's episodes: 0.5 for the shortest, -0.5 for
    the longest. A solved episode gets l, an unsolved one min(0, l): a short wrong answer earns nothing. All get 0 where
    all are equally long.

    Raises:
        ValueError: the environment gives no verdict.
    """
    lengths = [episode.n_tokens for episode in group.episodes]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    values = []
    for episode, n in zip(group.episodes, lengths, strict=True):
        if episode.success is None:
            raise ValueError(
                f"rollout.brevity_weight needs a verdict of each episode, but {group.env_id} gives none: its step() "
                "must put a bool into info['is_success'] (of a reward: a rewards.Score with success)"
            )
        value = 0.5 - (n - shortest) / (longest - shortest) if longest > shortest else 0.0
        values.append(value if episode.success else min(0.0, value))
    return values
