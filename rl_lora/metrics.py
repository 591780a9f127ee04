"""One flat record a step: what the groups were like before any was filtered, what the learner did, where time went."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rl_lora.samples import Sample, sample_of
from rl_lora.types import Group, StepStats

Record = dict[str, Any]


class Stopwatch:
    """Seconds per stage of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def summarize_samples(samples: Sequence[Sample], n_unscorable: int = 0) -> Record:
    """Means over scorable episodes; `accuracy` is None where the environment gives no verdict."""
    record: Record = {
        "reward": mean([sample["reward"] for sample in samples]),
        "accuracy": mean([float(sample["success"]) for sample in samples if sample["success"] is not None]),
        "truncated": mean([float(sample["truncated"]) for sample in samples]),
        "unscorable": n_unscorable / max(1, len(samples) + n_unscorable),
        "tokens_per_episode": mean([float(sample["tokens"]) for sample in samples]),
        "turns_per_episode": mean([float(len(sample["completions"])) for sample in samples]),
    }
    for name in sorted({name for sample in samples for name in sample["reward_parts"]}):
        record[f"parts/{name}"] = mean(
            [sample["reward_parts"][name] for sample in samples if name in sample["reward_parts"]]
        )
    return record


def summarize_groups(groups: Sequence[Group]) -> Record:
    """The step's sampled episodes, all of them. A group has signal if its rewards differ."""
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [[episode.reward for episode in group.episodes] for group in groups]
    record = summarize_samples(
        [sample_of(episode) for episode in episodes], sum(group.n_unscorable for group in groups)
    )
    record["reward_std"] = float(np.std([r for rewards_G in rewards for r in rewards_G])) if episodes else None
    record["groups_without_signal"] = mean([float(len(set(rewards_G)) < 2) for rewards_G in rewards])
    record["groups_solved"] = mean(
        [float(all(episode.success for episode in group.episodes)) for group in groups if group.episodes]
    )
    record["completion_tokens"] = sum(episode.n_tokens for episode in episodes)
    lengths = [episode.n_tokens for episode in episodes]
    record["tokens_per_episode_max"] = max(lengths, default=None)
    return record


def summarize_updates(updates: Sequence[StepStats]) -> Record:
    """The optimizer steps of one training step: sums of counts, the first `sampler_learner_kl`, the adapter's norms
    after the last, means of the rest."""
    record: Record = {
        "version": updates[-1].version,
        "A_norm": updates[-1].A_norm,
        "B_norm": updates[-1].B_norm,
        "learning_rate": updates[-1].learning_rate,
        "layers_recomputed": max(stats.n_layers_recomputed for stats in updates),
        "tokens_learned": sum(stats.n_tokens_learned for stats in updates),
        "sampler_learner_kl": next((s.sampler_learner_kl for s in updates if s.sampler_learner_kl is not None), None),
        "ratio_max": max((stats.ratio_max for stats in updates if stats.ratio_max is not None), default=None),
    }
    for name in ("loss", "entropy", "clip_fraction", "grad_norm", "step_norm"):
        record[name] = mean([value for stats in updates if (value := getattr(stats, name)) is not None])
    return record


def with_speed(record: Record, seconds: dict[str, float]) -> Record:
    """The record with seconds per stage, and tokens per second of sampling and of learning."""
    record |= {f"seconds/{stage}": value for stage, value in seconds.items()}
    if seconds.get("rollout"):
        record["rollout_tokens_per_second"] = record["completion_tokens"] / seconds["rollout"]
    if seconds.get("learn"):
        record["learn_tokens_per_second"] = record["tokens_learned"] / seconds["learn"]
    return record


class MetricsFile:
    """metrics.jsonl: one JSON object a line; `kind` is `train` or `eval`."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, kind: str, step: int, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **record}) + "\n")

    def read(self, kind: str | None = None) -> list[Record]:
        """The records so far. A last line that was cut off by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return [record for record in records if kind in (None, record["kind"])]

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: a resumed run says it again."""
        kept = [record for record in self.read() if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.path)
