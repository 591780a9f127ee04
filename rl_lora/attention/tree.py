"""A tree of token spans in one flat forward pass: sequences that share their beginnings, each shared token once.

A prefix that prompts share is the parent of the rest of each prompt, and that of its completions. A token
attends to what is before it in its own span and to all of its ancestors. Learning and prefill run on this layout; which
implementation computes attention on it is `interface.py`'s business.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rl_lora.attention.kv_cache import KeyValues
from rl_lora.attention.shared_prefix import Sharing, additive

CHUNK_ELEMENTS = 1 << 25
"""Attention scores that exist at a time: 128 MiB in float32."""
PAST = -1
"""Stands for a depth: the keys and values of an earlier pass."""

Span = tuple[int, int, int]
"""(first token, number of tokens >= 1, parent's index among the spans or -1)"""


@dataclass
class Depth:
    """The n spans of one depth, padded to L tokens."""

    tokens: np.ndarray
    """int64 (n, L): where the tokens stand in the flat pass; 0 on padding."""
    padding: np.ndarray
    """bool (n, L)"""
    lengths: np.ndarray
    """(n,)"""
    first: np.ndarray
    """(n,): the position of each first token."""
    owners: list[np.ndarray]
    """For every shallower depth, (n,): the ancestor there."""

    @property
    def positions(self) -> np.ndarray:
        """int64 (n, L), counted on behind a span's end, so that padding attends to itself."""
        return self.first[:, None] + np.arange(self.tokens.shape[1])


@dataclass
class Chunk:
    """Queries of some spans that are computed at a time, and the sources they attend to, under every key-value head."""

    kv_heads: int
    depth: int
    blocks: slice
    queries: slice
    sources: list[tuple[int, slice, int, Sharing | None]]
    """(depth of the source or PAST, its nodes, its first so many keys, sharing): every head has its own nodes and
    blocks, (H_kv, n), so that blocks of a node lie together."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)


class SpanTree:
    """The layout of a flat forward pass of N tokens, (1, N).

    Args:
        spans: together they cover all tokens, each once; a parent comes before its children.
        device: where the forward pass runs.
        past, past_of_span: keys and values of an earlier pass, and the node of them that each span continues; then no
            span has a parent, and there are no gradients.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device | str = "cpu",
        past: KeyValues | None = None,
        past_of_span: Sequence[int] = (),
    ):
        assert past is None or len(past_of_span) == len(spans)
        self.spans, self.device, self.past = spans, device, past
        depths: list[int] = []
        place: list[int] = []  # of each span, among those of its depth
        members: list[list[int]] = []  # the spans of each depth
        position_of_first: list[int] = []
        for i, (_, _, parent) in enumerate(spans):
            assert -1 <= parent < i
            depth = 0 if parent < 0 else depths[parent] + 1
            if depth == len(members):
                members.append([])
            depths.append(depth)
            place.append(len(members[depth]))
            members[depth].append(i)
            if parent >= 0:
                position_of_first.append(position_of_first[parent] + spans[parent][1])
            else:
                position_of_first.append(0 if past is None else int(past.lengths[past_of_span[i]]))
        self.n_tokens = sum(length for _, length, _ in spans)
        positions = np.empty(self.n_tokens, np.int64)
        self.depths: list[Depth] = []
        for spans_there in members:
            lengths = np.array([spans[i][1] for i in spans_there])
            index = np.zeros((len(spans_there), lengths.max()), np.int64)
            owners: list[list[int]] = [[] for _ in self.depths]
            for k, i in enumerate(spans_there):
                start, length, parent = spans[i]
                tokens = np.arange(start, start + length)
                index[k, :length] = tokens
                positions[tokens] = position_of_first[i] + np.arange(length)
                while parent >= 0:
                    owners[depths[parent]].append(place[parent])
                    parent = spans[parent][2]
            first = np.array([position_of_first[i] for i in spans_there])
            padding = np.arange(index.shape[1]) >= lengths[:, None]
            self.depths.append(Depth(index, padding, lengths, first, list(map(np.array, owners))))
        self._past_owner = np.array(past_of_span)
        self.positions = torch.from_numpy(positions).to(device)[None]
        """int64 (1, N)"""
        self.block_masks: dict[int | None, BlockMask] = {}
        """Block masks of `flex.py`, by sliding window."""
        self._chunks: dict[int, list[Chunk]] = {}
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.windows: set[int | None] = set()
        """The sliding windows that the model's layers have asked for; None is full attention."""

    @functools.cached_property
    def end(self) -> Tensor | None:
        """int64 (N,): see `ends`."""
        found = ends(self.spans)
        return None if found is None else torch.from_numpy(found).to(self.device)

    @functools.cached_property
    def table(self) -> Tensor:
        """int64 (n, 3): the spans."""
        return torch.tensor(self.spans)

    @functools.cached_property
    def past_of_span(self) -> Tensor:
        """int64 (n,): the node of the past that each span continues."""
        return torch.from_numpy(self._past_owner.astype(np.int64))

    def last(self) -> Tensor:
        """int64: where the last token of every span stands."""
        return torch.tensor([start + length - 1 for start, length, _ in self.spans], device=self.device)

    def nodes(self, x: Tensor) -> Tensor:
        """(1, h, N, D) -> (n, h, L, D): spans that have no parents, as `kv_cache.KeyValues` keeps them."""
        return x[0].transpose(0, 1)[self._tokens_of_roots].transpose(1, 2).contiguous()

    @functools.cached_property
    def _tokens_of_roots(self) -> Tensor:
        return torch.from_numpy(self.depths[0].tokens).to(self.device)

    @functools.cached_property
    def paddings(self) -> list[Tensor | None]:
        """bool (n, L) of each depth, None where there is none."""
        found = [depth.padding if depth.padding.any() else None for depth in self.depths]
        return [None if x is None else torch.from_numpy(x).to(self.device) for x in found]

    def places(self, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Between the rows of N tokens, (N, H), and those of all depths' padded spans, each (H_kv, n, H / H_kv, L):
        the row that goes into each place of the second, and the place that each of the first has there; int64."""
        if (heads, kv_heads) not in self._places:
            rows, place, offset = [], np.empty((self.n_tokens, heads), np.int64), 0
            for depth in self.depths:
                head = np.arange(heads).reshape(kv_heads, 1, -1, 1)
                of_depth = depth.tokens[:, None] * heads + head
                places = offset + np.arange(of_depth.size).reshape(of_depth.shape)
                there = ~depth.padding
                place[depth.tokens[there]] = places.transpose(1, 3, 0, 2)[there].reshape(-1, heads)
                rows.append(of_depth.ravel())
                offset += of_depth.size
            row_of_place, place_of_row = (
                torch.from_numpy(x).to(self.device) for x in (np.concatenate(rows), place.ravel())
            )
            self._places[heads, kv_heads] = row_of_place, place_of_row
        return self._places[heads, kv_heads]

    def chunks(self, heads: int, kv_heads: int) -> list[Chunk]:
        """The pieces that attention is computed in: their scores stay within `CHUNK_ELEMENTS`."""
        if kv_heads not in self._chunks:
            self._chunks[kv_heads] = []
            for d, depth in enumerate(self.depths):
                n, L = depth.tokens.shape
                keys = sum(other.tokens.shape[1] for other in self.depths[: d + 1])
                keys += 0 if self.past is None else int(self.past.lengths.max())
                blocks = max(1, CHUNK_ELEMENTS // (heads * L * keys))
                queries = min(L, max(1, CHUNK_ELEMENTS // (heads * keys)))  # less than L for one block at a time only
                for b in range(0, n, blocks):
                    for q in range(0, L, queries):
                        part = slice(b, min(b + blocks, n)), slice(q, min(q + queries, L))
                        self._chunks[kv_heads].append(self._chunk(kv_heads, d, *part))
        return self._chunks[kv_heads]

    def _chunk(self, kv_heads: int, d: int, blocks: slice, queries: slice) -> Chunk:
        def sharing(owner: np.ndarray, n: int) -> Sharing:
            return Sharing((n * np.arange(kv_heads)[:, None] + owner).ravel(), n * kv_heads, self.device)

        sources: list[tuple[int, slice, int, Sharing | None]] = []
        if self.past is not None:
            shared = sharing(self._past_owner[blocks], len(self.past))
            sources.append((PAST, slice(None), self.past.keys[0].shape[2], shared))
        for a, owner in enumerate(self.depths[d].owners):
            mine = owner[blocks]
            nodes = slice(int(mine.min()), int(mine.max()) + 1)
            shared = sharing(mine - nodes.start, nodes.stop - nodes.start)
            sources.append((a, nodes, self.depths[a].tokens.shape[1], shared))
        sources.append((d, blocks, queries.stop, None))  # nothing behind the last query is seen
        return Chunk(kv_heads, d, blocks, queries, sources)

    def mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """float32 (H_kv * blocks, 1, queries, keys)"""
        if window not in chunk.masks:
            depth = self.depths[chunk.depth]
            query = depth.positions[chunk.blocks, chunk.queries, None]
            parts = []
            for a, _, n_keys, sharing in chunk.sources:
                if sharing is None:
                    key = depth.positions[chunk.blocks, None, :n_keys]
                    allowed = key <= query
                elif a == PAST:
                    assert self.past is not None
                    key = np.arange(n_keys)[None, None]
                    allowed = key < self.past.lengths[self._past_owner[chunk.blocks], None, None]
                else:
                    owner = depth.owners[a][chunk.blocks]
                    key = self.depths[a].positions[owner, None, :n_keys]
                    allowed = np.arange(n_keys) < self.depths[a].lengths[owner, None, None]
                if window is not None:
                    allowed = allowed & (query - key < window)
                parts.append(np.broadcast_to(allowed, (*query.shape[:2], n_keys)))
            mask = additive(torch.from_numpy(np.concatenate(parts, -1)).to(self.device))
            chunk.masks[window] = mask.repeat(chunk.kv_heads, 1, 1, 1)
        return chunk.masks[window]


def ends(spans: Sequence[Span]) -> np.ndarray | None:
    """int64 (N,): for every token, where the descendants of its span end. None unless spans lie in the order of a walk
    through the tree: each behind the one before, and behind its parent or a descendant of that."""
    stop = [start + length for start, length, _ in spans]
    end = list(stop)
    path: list[int] = []  # from a root to the span before
    for i, (start, _, parent) in enumerate(spans):
        if start != (stop[i - 1] if i else 0):
            return None
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            return None
        path.append(i)
    for i in range(len(spans) - 1, -1, -1):
        if (parent := spans[i][2]) >= 0:
            end[parent] = max(end[parent], end[i])
    return np.repeat(end, [length for _, length, _ in spans])
