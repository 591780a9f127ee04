"""Held-out accuracy with its interval. The trainer's curve and the `evaluate` command are this code.

Several adapters, and the bare base, are evaluated in the same batches over one base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl_lora.metrics import Record, summarize_episodes
from rl_lora.rollout import RolloutWorker
from rl_lora.types import Group


@dataclass(frozen=True)
class Evaluation:
    """What one adapter (None: the base) did on the held-out problems."""

    adapter: str | None
    groups: tuple[Group, ...]

    @property
    def n_scored(self) -> int:
        return sum(len(group.episodes) for group in self.groups)

    @property
    def record(self) -> Record:
        """Means, as `metrics.summarize_episodes` has them, and for one sample a problem the accuracy's interval."""
        episodes = [episode for group in self.groups for episode in group.episodes]
        record = summarize_episodes(episodes, sum(group.n_unscorable for group in self.groups))
        record["episodes"] = self.n_scored
        if record["accuracy"] is not None and all(len(group.episodes) <= 1 for group in self.groups):
            verdicts = [episode.success for episode in episodes if episode.success is not None]
            record["accuracy_low"], record["accuracy_high"] = wilson(sum(verdicts), len(verdicts))
        return record

    @property
    def score(self) -> float:
        """What checkpoints are compared by: accuracy, or the mean reward where the environment gives no verdict."""
        record = self.record
        value = record["reward"] if record["accuracy"] is None else record["accuracy"]
        return -math.inf if value is None else float(value)

    def samples(self) -> list[dict[str, Any]]:
        """One flat record an episode, for samples.jsonl."""
        return [
            {
                "adapter": self.adapter,
                "env": episode.env_id,
                "seed": episode.seed,
                "observations": list(episode.observations),
                "replies": [turn.text for turn in episode.turns],
                "reward": episode.reward,
                "reward_parts": episode.reward_parts,
                "success": episode.success,
                "stop": str(episode.stop),
                "truncated": episode.truncated,
                "tokens": episode.n_tokens,
            }
            for group in self.groups
            for episode in group.episodes
        ]


def evaluate(
    worker: RolloutWorker,
    seeds: Sequence[int],
    adapters: Sequence[str | None],
    *,
    n: int = 1,
    temperature: float = 0.0,
    random_seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """n episodes of every seed under every adapter (None: the bare base), in the order of `adapters`."""
    groups = worker.collect(
        seeds, adapters=adapters, n=n, random_seed=(random_seed,), temperature=temperature, on_token=on_token
    )
    return [
        Evaluation(adapter, tuple(groups[i * len(seeds) : (i + 1) * len(seeds)])) for i, adapter in enumerate(adapters)
    ]


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), for independent problems with one sample each."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
