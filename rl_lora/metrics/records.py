"""One flat record a step: figures of the groups before any was filtered, of the learner, and of time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rl_lora.metrics.samples import Sample, sample_of
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.types import Group, StepStats

Record = dict[str, Any]
MAX_REASONS, MAX_REASON = 5, 160
"""Different reasons of unscorable episodes that a record holds, and characters of each."""


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

    def move(self, stage: str, to: str, seconds: float) -> None:
        """Count seconds of one stage for another."""
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds
        self.seconds[stage] -= seconds


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, the most common ones first; the others together are "other reasons"."""
    counts = Counter(" ".join(reason.split())[:MAX_REASON] for reason in reasons)
    common = dict(counts.most_common(MAX_REASONS))
    others = counts.total() - sum(common.values())
    return common | ({"other reasons": others} if others else {})


def summarize_samples(samples: Sequence[Sample], n_unscorable: int = 0, reasons: Iterable[str] = ()) -> Record:
    """Means over scorable episodes; `accuracy` is None where the environment gives no verdict. `unscorable_reasons`,
    where there are any: how many episodes could not be scored for each."""
    record: Record = {
        "reward": mean([sample["reward"] for sample in samples]),
        "accuracy": mean([float(sample["success"]) for sample in samples if sample["success"] is not None]),
        "truncated": mean([float(sample["truncated"]) for sample in samples]),
        "unscorable": n_unscorable / max(1, len(samples) + n_unscorable),
        "tokens_per_episode": mean([float(sample["tokens"]) for sample in samples]),
        "turns_per_episode": mean([float(len(sample["completions"])) for sample in samples]),
    }
    if counts := count_reasons(reasons):
        record["unscorable_reasons"] = counts
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
        [sample_of(episode) for episode in episodes],
        sum(group.n_unscorable for group in groups),
        (reason for group in groups for reason in group.reasons),
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
    """The optimizer steps of one training step: sums of counts, the first `sampler_learner_kl`, norms of the
    weights after the last, means of the rest."""
    record: Record = {
        "version": updates[-1].version,
        **updates[-1].norms,
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
        """Raises FileError; the file is then as it was."""
        files.append_text(self.path, json.dumps({"kind": kind, "step": step, **record}) + "\n")

    def read(self, kind: str | None = None) -> list[Record]:
        """The records so far. A line that is damaged, or was cut off by a crash, is left out."""
        return [record for record in self._read()[0] if kind in (None, record["kind"])]

    def rewind(self, step: int, evaluated: bool = True) -> str:
        """Forget what came after `step`: a resumed run says it again. Without `evaluated`, its evaluation too.

        Damaged lines go to metrics.damaged.jsonl. Returns what there is to say of them, or nothing.
        """
        records, damaged, torn = self._read()
        kept = [r for r in records if r["step"] < step or (r["step"] == step and (evaluated or r["kind"] != "eval"))]
        notes = []
        if damaged:
            aside = self.path.with_name("metrics.damaged.jsonl")
            files.append_text(aside, "".join(text + "\n" for text in damaged.values()))
            lines = ", ".join(map(str, damaged))
            notes.append(f"{self.path}, line {lines}: damaged, moved to {aside.name}; what stands behind it is kept")
        if damaged or torn or len(kept) < len(records):
            files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        if missing := sorted({*range(1, step + 1)} - {r["step"] for r in kept if r["kind"] == "train"}):
            notes.append(f"{self.path} has no record of step {', '.join(map(str, missing))}")
        return "; ".join(notes)

    def _read(self) -> tuple[list[Record], dict[int, str], bool]:
        """The records; the text of damaged lines, by number; whether the last line has no end."""
        if not self.path.exists():
            return [], {}, False
        lines = self.path.read_bytes().decode("utf-8", errors="replace").split("\n")
        records: list[Record] = []
        damaged = {}
        for number, line in enumerate(lines, 1):
            found, whole = _records(line)
            records += found
            if not whole and number < len(lines):  # a process died in the last line: it will be said again
                damaged[number] = line
        return records, damaged, bool(lines[-1])


def _records(line: str) -> tuple[list[Record], bool]:
    """The records that can be read of a line, and whether it is one and nothing else. Two may share a line whose end
    between them was lost."""
    line = line.removesuffix("\r")  # of an editor that ends lines in its own way
    decoder, found, end = json.JSONDecoder(), list[Record](), 0
    for match in re.finditer(r'\{"kind"', line):
        if match.start() < end:
            continue
        try:
            record, end = decoder.raw_decode(line, match.start())
        except ValueError:
            continue
        if record["kind"] in ("train", "eval") and isinstance(record.get("step"), int):
            found.append(record)
    return found, not line or (len(found) == 1 and line.startswith("{") and end == len(line))
