"""Groups -> packed micro-batches: each prompt once, its completions behind it, no token that nothing is learned from.

What several prompts begin with stands once as well.
The last token of a completion is a target but never an input. Where a model cannot share prompts, the same code packs
one sequence a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rl_lora.algorithms.objectives import TOKEN_MEAN, Aggregation
from rl_lora.attention.prefixes import Prefix, common_prefix, find_shared_prefixes, prefix_of
from rl_lora.attention.tree import Span, SpanTree
from rl_lora.learner.batch import Batch
from rl_lora.types import Episode, Group


@dataclass(frozen=True)
class Trajectory:
    """A token sequence, and the spans of it that the model wrote. A multi-turn episode is one, as long as each prompt
    continues the turn before to the token."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, tuple[float, ...]], ...]
    """(start of a completion, its behaviour log-probabilities)"""
    advantage: float
    weight: float = 1.0
    """Of each of its tokens, before the division by the step's denominator."""

    @property
    def first_target(self) -> int:
        return self.spans[0][0]


def trajectories(episode: Episode, advantage: float, weight: float = 1.0) -> Iterator[Trajectory]:
    """An episode as the fewest token sequences that hold its turns."""
    ids: tuple[int, ...] = ()
    spans: list[tuple[int, tuple[float, ...]]] = []
    for turn in episode.turns:
        if not turn.completion_ids:
            continue
        if spans and turn.prompt_ids[: len(ids)] != ids:
            yield Trajectory(ids, tuple(spans), advantage, weight)
            spans = []
        spans.append((len(turn.prompt_ids), turn.logprobs))
        ids = turn.prompt_ids + turn.completion_ids
    if spans:
        yield Trajectory(ids, tuple(spans), advantage, weight)


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch: `prefix` tokens of `members[0]` that all members begin with, then each one's own."""

    adapter: str | None
    prefix: int
    members: tuple[Trajectory, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """What all members begin with."""
        return self.members[0].ids[: self.prefix]

    def __len__(self) -> int:
        return self.prefix + sum(len(member.ids) - 1 - self.prefix for member in self.members)


def rows_of(
    group: Group, advantages_G: np.ndarray, budget: int, shared_prefix: bool, aggregation: Aggregation = TOKEN_MEAN
) -> Iterator[PackedRow]:
    """Rows of at most `budget` tokens; a trajectory that is longer than that alone has a row of its own."""
    members = [
        trajectory
        for episode, advantage in zip(group.episodes, advantages_G, strict=True)
        if advantage != 0.0 and episode.n_tokens
        for trajectory in trajectories(episode, float(advantage), aggregation.weight(episode.n_tokens))
    ]
    if not members:
        return
    if not shared_prefix:
        yield from (PackedRow(group.adapter, len(member.ids) - 1, (member,)) for member in members)
        return
    prefix = min(min(member.first_target for member in members), common_prefix([member.ids for member in members]))
    row: list[Trajectory] = []
    length = prefix
    for member in members:
        own = len(member.ids) - 1 - prefix
        if row and length + own > budget:
            yield PackedRow(group.adapter, prefix, tuple(row))
            row, length = [], prefix
        row.append(member)
        length += own
    yield PackedRow(group.adapter, prefix, tuple(row))


def pack(
    groups: Sequence[tuple[Group, np.ndarray]],
    *,
    denominators: Mapping[str | None, float],
    tokens_per_microbatch: int,
    aggregation: Aggregation = TOKEN_MEAN,
    shared_prefix: bool = True,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Micro-batches of at most `tokens_per_microbatch` tokens, padding included.

    groups: with one advantage an episode, (G,). The weight of a token is the aggregation's, divided by the
    denominator of its adapter.
    """
    rows = [
        row
        for group, advantages_G in groups
        for row in rows_of(group, advantages_G, tokens_per_microbatch, shared_prefix, aggregation)
    ]
    lay = _tree if shared_prefix else _padded
    shared_prefixes = find_shared_prefixes((row.adapter, row.prompt) for row in rows) if shared_prefix else []
    # Neighbours carry the same adapter, so that each adapter reads one slice of the batch; they begin alike. Of
    # those the long ones come first: padded rows have similar lengths, and what does not fit memory fails early.
    placed = [(row, prefix_of(shared_prefixes, row.adapter, row.prompt)) for row in rows]
    placed.sort(key=lambda item: (item[0].adapter or "", -1 if item[1] is None else item[1], -len(item[0])))
    batches: list[list[tuple[PackedRow, int]]] = []
    size = longest = 0  # tokens of the batch that is being filled; of its longest row
    begun: set[Prefix] = set()
    for row, index in placed:
        n_shared = 0 if index is None else len(shared_prefixes[index][1])
        begins = row.adapter, row.prompt[:n_shared]
        if shared_prefix:
            grown = size + len(row) - (n_shared if begins in begun else 0)
        else:
            grown = (len(batches[-1]) + 1 if batches else 1) * max(longest, len(row))
        if not batches or grown > tokens_per_microbatch:
            batches.append([])
            grown, longest, begun = len(row), 0, set()
        batches[-1].append((row, n_shared))
        size, longest = grown, max(longest, len(row))
        begun.add(begins)
    return [_batch(lay(batch, device), [row for row, _ in batch], denominators, device) for batch in batches]


Place = Callable[[np.ndarray], np.ndarray]
"""From indices into a trajectory to where its tokens stand in the batch."""


@dataclass(frozen=True)
class _Laid:
    """Rows laid out for a forward pass; place[row][member]."""

    tokens: np.ndarray
    tree: SpanTree | None
    adapters: tuple[str | None, ...]
    place: list[list[Place]]


def _tree(rows: Sequence[tuple[PackedRow, int]], device: torch.device | str) -> _Laid:
    """All rows in one flat sequence: shared prefixes, prompts, completions. Rows of a shared prefix are neighbours."""
    tokens: list[int] = []
    spans: list[Span] = []
    adapters: list[str | None] = []
    place: list[list[Place]] = []
    shared_spans: dict[Prefix, int] = {}

    def add(ids: Sequence[int], adapter: str | None, parent: int) -> int:
        """A span behind its parent, unless there is nothing to add; the span to go on from."""
        if not len(ids):
            return parent
        spans.append((len(tokens), len(ids), parent))
        tokens.extend(ids)
        adapters.extend([adapter] * len(ids))
        return len(spans) - 1

    for row, n_shared in rows:
        key = row.adapter, row.prompt[:n_shared]
        if key not in shared_spans:
            shared_spans[key] = add(key[1], row.adapter, -1)
        shared = shared_spans[key]
        prompt = add(row.prompt[n_shared:], row.adapter, shared)
        place.append([])
        for member in row.members:
            own = add(member.ids[row.prefix : -1], row.adapter, prompt)
            shifts = np.array([spans[shared][0], spans[prompt][0] - n_shared, spans[own][0] - row.prefix])
            bounds = np.array([n_shared, row.prefix])
            place[-1].append(partial(_stand, bounds, shifts))
    return _Laid(np.array([tokens]), SpanTree(spans, device), tuple(adapters), place)


def _stand(bounds: np.ndarray, shifts: np.ndarray, j: np.ndarray) -> np.ndarray:
    return j + shifts[np.searchsorted(bounds, j, "right")]


def _padded(rows: Sequence[tuple[PackedRow, int]], device: torch.device | str) -> _Laid:
    """One sequence a row."""
    L = max(len(row) for row, _ in rows)
    tokens = np.zeros((len(rows), L), np.int64)
    for b, (row, _) in enumerate(rows):
        tokens[b, : len(row)] = row.members[0].ids[:-1]
    place: list[list[Place]] = [[partial(np.add, b * L)] for b in range(len(rows))]
    return _Laid(tokens, None, tuple(row.adapter for row, _ in rows), place)


def _batch(
    laid: _Laid, rows: Sequence[PackedRow], denominators: Mapping[str | None, float], device: torch.device | str
) -> Batch:
    index: list[np.ndarray] = []
    targets: list[int] = []
    behaviour: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    for row, places in zip(rows, laid.place, strict=True):
        for member, place in zip(row.members, places, strict=True):
            for start, logprobs in member.spans:
                n = len(logprobs)
                index.append(place(np.arange(start - 1, start - 1 + n)))  # position j predicts token j + 1
                targets.extend(member.ids[start : start + n])
                behaviour.extend(logprobs)
                advantages.extend([member.advantage] * n)
                weights.extend([member.weight / denominators[row.adapter]] * n)
    return Batch(
        tokens=torch.from_numpy(laid.tokens).to(device),
        tree=laid.tree,
        index=torch.from_numpy(np.concatenate(index)).to(device),
        targets=torch.tensor(targets, device=device),
        behaviour_logprobs=torch.tensor(behaviour, device=device),
        advantages=torch.tensor(advantages, dtype=torch.float32, device=device),
        weights=torch.tensor(weights, device=device),
        adapters=laid.adapters,
        n_tokens=laid.tokens.size if laid.tree is not None else sum(map(len, rows)),
    )
