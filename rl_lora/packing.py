"""Groups -> packed micro-batches: each prompt once, its completions behind it, no token that nothing is learned from.

The last token of a completion is a target but never an input. Where a model cannot share prompts, the same code packs
one sequence a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl_lora.types import Batch, Episode, Group


@dataclass(frozen=True)
class Trajectory:
    """A token sequence, and the spans of it that the model wrote. A multi-turn episode is one, as long as each prompt
    continues the turn before to the token."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, tuple[float, ...]], ...]
    """(start of a completion, its behaviour log-probabilities)"""
    advantage: float

    @property
    def first_target(self) -> int:
        return self.spans[0][0]


def trajectories(episode: Episode, advantage: float) -> Iterator[Trajectory]:
    """An episode as the fewest token sequences that hold its turns."""
    ids: tuple[int, ...] = ()
    spans: list[tuple[int, tuple[float, ...]]] = []
    for turn in episode.turns:
        if not turn.completion_ids:
            continue
        if spans and turn.prompt_ids[: len(ids)] != ids:
            yield Trajectory(ids, tuple(spans), advantage)
            spans = []
        spans.append((len(turn.prompt_ids), turn.logprobs))
        ids = turn.prompt_ids + turn.completion_ids
    if spans:
        yield Trajectory(ids, tuple(spans), advantage)


@dataclass(frozen=True)
class Row:
    """One row of a batch: `prefix` tokens of `members[0]` that all members begin with, then each one's own."""

    adapter: str | None
    prefix: int
    members: tuple[Trajectory, ...]

    def __len__(self) -> int:
        return self.prefix + sum(len(member.ids) - 1 - self.prefix for member in self.members)


def rows_of(group: Group, advantages_G: np.ndarray, budget: int, shared_prefix: bool) -> Iterator[Row]:
    """Rows of at most `budget` tokens; a trajectory that is longer than that alone has a row of its own."""
    members = [
        trajectory
        for episode, advantage in zip(group.episodes, advantages_G, strict=True)
        if advantage != 0.0
        for trajectory in trajectories(episode, float(advantage))
    ]
    if not members:
        return
    if not shared_prefix:
        yield from (Row(group.adapter, len(member.ids) - 1, (member,)) for member in members)
        return
    prefix = _common_prefix(members)
    row: list[Trajectory] = []
    length = prefix
    for member in members:
        own = len(member.ids) - 1 - prefix
        if row and length + own > budget:
            yield Row(group.adapter, prefix, tuple(row))
            row, length = [], prefix
        row.append(member)
        length += own
    yield Row(group.adapter, prefix, tuple(row))


def _common_prefix(members: Sequence[Trajectory]) -> int:
    """Tokens that all members begin with, up to the first that one of them wrote."""
    n = min(member.first_target for member in members)
    first = members[0].ids
    while any(member.ids[:n] != first[:n] for member in members):
        n -= 1
    return n


def pack(
    groups: Sequence[tuple[Group, np.ndarray]],
    *,
    denominators: Mapping[str | None, float],
    tokens_per_microbatch: int,
    shared_prefix: bool = True,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Micro-batches of at most `tokens_per_microbatch` positions, padding included.

    groups: with one advantage an episode, (G,). denominators: by adapter, what each of its tokens is divided by.
    Long rows come first, so that a batch that does not fit memory fails at once.
    """
    rows = [
        row
        for group, advantages_G in groups
        for row in rows_of(group, advantages_G, tokens_per_microbatch, shared_prefix)
    ]
    rows.sort(key=lambda row: (-len(row), row.adapter or ""))
    batches: list[list[Row]] = []
    for row in rows:
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= tokens_per_microbatch:
            batches[-1].append(row)
        else:
            batches.append([row])
    # Neighbours carry the same adapter, so that each adapter reads one slice of the batch.
    return [_batch(sorted(rows, key=lambda row: row.adapter or ""), denominators, device) for rows in batches]


def _batch(rows: Sequence[Row], denominators: Mapping[str | None, float], device: torch.device | str) -> Batch:
    B, L = len(rows), max(map(len, rows))
    tokens, positions = np.zeros((B, L), np.int64), np.zeros((B, L), np.int64)
    segments = np.full((B, L), -1, np.int64)
    index: list[np.ndarray] = []
    targets: list[int] = []
    behaviour: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    for b, row in enumerate(rows):
        p = row.prefix
        tokens[b, :p], positions[b, :p], segments[b, :p] = row.members[0].ids[:p], np.arange(p), 0
        at = p
        for k, member in enumerate(row.members, 1):
            own = slice(at, at + len(member.ids) - 1 - p)
            tokens[b, own], positions[b, own], segments[b, own] = member.ids[p:-1], np.arange(p, len(member.ids) - 1), k
            for start, logprobs in member.spans:
                before = np.arange(start - 1, start - 1 + len(logprobs))  # position j predicts token j + 1
                index.append(b * L + np.where(before < p, before, at + before - p))
                targets.extend(member.ids[start : start + len(logprobs)])
                behaviour.extend(logprobs)
                advantages.extend([member.advantage] * len(logprobs))
                weights.extend([1.0 / denominators[row.adapter]] * len(logprobs))
            at = own.stop
    return Batch(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        segments=torch.from_numpy(segments).to(device),
        index=torch.from_numpy(np.concatenate(index)).to(device),
        targets=torch.tensor(targets, device=device),
        behaviour_logprobs=torch.tensor(behaviour, device=device),
        advantages=torch.tensor(advantages, dtype=torch.float32, device=device),
        weights=torch.tensor(weights, device=device),
        adapters=tuple(row.adapter for row in rows),
    )
