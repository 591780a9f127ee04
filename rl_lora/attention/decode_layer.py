"""Attention of one layer in a decode step: of new tokens to the prefixes that their rows share and to their suffixes.

Tensors in, tensors out, and nothing that depends on their values: so that a step can be recorded, or compiled.
Which rows there are and where their keys and values lie is `kv_cache.py`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lora.attention.shared_prefix import KeySource, Sharing, additive, attend_to_sources
from rl_lora.kernels import decode_attention
from rl_lora.kernels.attention_options import AttentionOptions


class Shared(NamedTuple):
    """Keys and values of n nodes that rows share: of shared prefixes, or of prompts."""

    key: Tensor
    """(n, H_kv, L, D)"""
    value: Tensor
    lengths: Tensor
    """int64 (R,): tokens that each row's node has."""
    sharing: Sharing


class DecodeLayer:
    """The layout of a layer, where R rows read n tokens each.

    Args:
        keys, values: of the rows' suffixes, (buffers >= R, H_kv, room, D).
        at: int64 (R, n), the place of each new token in its row's suffix.
        slots: int64 (W,), 0 to W - 1: the places in suffixes that attention reads.
        shared: what comes before a row's suffix, from the first.
        rows: int64 (R,), which buffers they have.
        first: these are the first R.
        masks: those that other layers of the same step have made, by window.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        at: Tensor,
        slots: Tensor,
        shared: Sequence[Shared],
        rows: Tensor,
        first: bool = True,
        masks: dict[int | None, Tensor] | None = None,
    ):
        self.keys, self.values, self.at, self.slots, self.shared = keys, values, at, slots, shared
        self.rows, self.first = rows, first
        self.masks = {} if masks is None else masks

    def tensors(self) -> list[Tensor]:
        """All that it consists of, where its rows are the first; `of` brings it together again."""
        of_shared = [(s.key, s.value, s.lengths, *s.sharing.wide) for s in self.shared]
        return [self.keys, self.values, self.at, self.slots, self.rows, *itertools.chain(*of_shared)]

    def dynamic(self) -> list[tuple[int, ...]]:
        """The dimensions of each of `tensors` whose size changes from step to step."""
        return [(0, 2), (0, 2), (0,), (0,), (0,), *[(0, 2), (0, 2), (0,), (0, 1), (0,)] * len(self.shared)]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> DecodeLayer:
        """It may have passed through a tracer: sizes are those of the tensors, and nothing else is known of them."""
        keys, values, at, slots, rows, *rest = tensors
        shared = [
            Shared(key, value, lengths, Sharing.of(blocks, place))
            for key, value, lengths, blocks, place in zip(*[iter(rest)] * 5, strict=True)
        ]
        return cls(keys, values, at, slots, shared, rows)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, (R, H_kv, n, D); return those of the suffixes, (R, H_kv, W, D)."""
        R, W = self.at.shape[0], self.slots.shape[0]
        suffixes = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[self.rows[:, None], :, self.at] = new.transpose(1, 2)
            suffixes.append((buffer[:R] if self.first else buffer[self.rows])[:, :, :W])
        return suffixes[0], suffixes[1]

    def written(self) -> tuple[Tensor, Tensor]:
        """What `update` has written."""
        return self.keys[self.rows[:, None], :, self.at], self.values[self.rows[:, None], :, self.at]

    def forget(self) -> None:
        """Write zeros there."""
        for buffer in (self.keys, self.values):
            buffer[self.rows[:, None], :, self.at] = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """query: (R, H, n, D); key, value: of the suffixes, (R, H_kv, W, D). Returns (R, H, n, D)."""
        keys, values = [*(s.key for s in self.shared), key], [*(s.value for s in self.shared), value]
        if decode_attention.supports(query, keys, values):
            nodes, lengths = [s.sharing.owner for s in self.shared], [s.lengths for s in self.shared]
            return decode_attention.decode_attention(query, keys, values, nodes, lengths, self.at, options)
        sources = [KeySource(shared.key, shared.value, shared.sharing) for shared in self.shared]
        return attend_to_sources(query, [*sources, KeySource(key, value)], self.mask(options.window), options)

    def mask(self, window: int | None) -> Tensor:
        """float32 (R, 1, n, keys): what each new token may attend to."""
        if window not in self.masks:
            at = self.at[:, :, None]  # (R, n, 1)
            first = torch.zeros_like(at[:, :1])  # (R, 1, 1): position of a source's first key
            query = at + sum(shared.lengths for shared in self.shared)[:, None, None]  # type: ignore[index]
            parts = []
            for shared in self.shared:
                length = shared.lengths[:, None, None]
                j = torch.arange(shared.key.shape[2], device=at.device)
                parts.append(_allowed(j < length, query - first - j, window))
                first = first + length
            parts.append(_allowed(self.slots <= at, query - first - self.slots, window))
            self.masks[window] = additive(torch.cat(parts, -1))
        return self.masks[window]


def _allowed(exists: Tensor, distance: Tensor, window: int | None) -> Tensor:
    """(R, n, keys)"""
    return exists.expand_as(distance) if window is None else exists & (distance < window)
