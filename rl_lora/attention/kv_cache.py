"""The KV cache of a rollout: of shared prefixes, of prompts, and of each row's own suffix, the tokens sampled for it.

The first two are stored once and shared by all rows behind them; suffixes live in buffers that grow by blocks and
outlast a turn. The sampler's scheduler says which rows leave and which come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from rl_lora.attention.decode_layer import DecodeLayer, Shared
from rl_lora.attention.shared_prefix import Sharing
from rl_lora.kernels.attention_options import AttentionOptions

BLOCK = 32
"""Tokens that the buffers of suffixes grow by, at least."""
GPU_BLOCKS = 4
"""So many blocks at a time on a GPU: a recorded step (a CUDA graph) holds as long as the buffers do."""
READ = 8
"""Tokens by which the part of them grows that attention is given, in float32 on a CPU. Elsewhere it is given the whole:
in bfloat16, torch would copy a part first, and a GPU would have to record its steps anew. The C++ needs neither: it
reads each row up to its last token."""
SHORT_PREFIX = 64
"""Tokens. A prompt keeps a copy of a shared prefix as short as this: to read one source more takes longer."""


class KeyValues:
    """Keys and values of n token spans: lists over layers of (n, H_kv, L, D), padded behind `lengths` (n,)."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: np.ndarray):
        self.keys, self.values, self.lengths = keys, values, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, nodes: np.ndarray) -> None:
        """Keep these."""
        if len(nodes) < len(self):
            index = torch.from_numpy(nodes).to(self.keys[0].device)
            self.lengths = self.lengths[nodes]
            L = int(self.lengths.max())
            self.keys, self.values = ([x[index, :, :L] for x in xs] for xs in (self.keys, self.values))

    def append(self, other: KeyValues) -> None:
        L = max(self.keys[0].shape[2], other.keys[0].shape[2])
        self.keys, self.values = (
            [torch.cat([F.pad(x, (0, 0, 0, L - x.shape[2])) for x in pair]) for pair in zip(mine, theirs, strict=True)]
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def part(self, nodes: slice) -> KeyValues:
        """These, in the same memory."""
        keys, values = ([x[nodes] for x in xs] for xs in (self.keys, self.values))
        return KeyValues(keys, values, self.lengths[nodes])

    def behind(self, others: KeyValues, other_of_node: np.ndarray) -> KeyValues:
        """Each with all that one of the others holds before its own."""
        start = others.lengths[other_of_node]
        room = int(start.max()) + self.keys[0].shape[2]
        keys, values = (
            [x.new_zeros(len(self), x.shape[1], room, x.shape[3]) for x in xs] for xs in (self.keys, self.values)
        )
        for other in np.unique(other_of_node):
            t = int(others.lengths[other])
            index = torch.from_numpy(np.flatnonzero(other_of_node == other)).to(self.keys[0].device)
            for new, mine, theirs in (
                *zip(keys, self.keys, others.keys, strict=True),
                *zip(values, self.values, others.values, strict=True),
            ):
                new[index, :, :t] = theirs[other, :, :t]
                new[index, :, t : t + mine.shape[2]] = mine[index]
        return KeyValues(keys, values, self.lengths + start)

    def append_empty(self) -> None:
        """A node without tokens."""
        keys, values = ([x.new_zeros(1, x.shape[1], 0, x.shape[3]) for x in xs] for xs in (self.keys, self.values))
        self.append(KeyValues(keys, values, np.zeros(1, np.int64)))


class PrefillCache(Cache):
    """Keeps the keys and values that a forward pass computes, (B, H_kv, L, D) a layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        assert layer_idx == len(self.keys), f"layer {layer_idx} came after {len(self.keys)} layers"
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class DecodeCache(Cache):
    """R rows, each behind a prompt, and the layout of forward passes over their next tokens.

    Row r reads the prefix that its prompt shares with others, where there is one, then the rest of its prompt, then its
    own suffix of `t[r]` tokens. `begin` says which tokens come next.
    """

    def __init__(self, device: torch.device | str, *, short_prefix: int = SHORT_PREFIX):
        super().__init__(layers=[])
        self.device, self.short_prefix = device, short_prefix
        self.prefixes: KeyValues | None = None
        """Shared by prompts. The last one is empty: the prefix of prompts that share none."""
        self.prompts: KeyValues | None = None
        self.prefix_of_prompt = np.zeros(0, np.int64)
        self.prompt_of_row = np.zeros(0, np.int64)
        self.t = np.zeros(0, np.int64)
        """(R,): tokens of each row's suffix."""
        self.keys: list[Tensor] = []
        """Of each layer, (rows >= R, H_kv, room >= max t, D)."""
        self.values: list[Tensor] = []
        self.arrangement = 0
        """Counts how often rows, or what else a step reads, have moved in memory: a recorded step holds for one."""
        self._at: Tensor | None = None
        """`t` on the device, int64 (R,): one tensor for an arrangement, since a recorded step reads and writes it."""
        self._at_is_stale = False
        self._asked: set[int] | None = None
        self._width = 0  # tokens of the suffixes' buffers that attention reads
        self._shared: list[tuple[KeyValues, np.ndarray]] = []  # what rows share, and the node of each row
        self._sharing: list[Sharing] = []
        self._lengths: list[Tensor] = []  # of each row's prefix and prompt, int64 (R,), on the device

    def __len__(self) -> int:
        return len(self.t)

    @property
    def room(self) -> int:
        """Tokens that the buffer of a suffix can hold."""
        return self.keys[0].shape[2] if self.keys else 0

    def admit(self, prompts: KeyValues, prefix_of_prompt: np.ndarray, prompt_of_row: np.ndarray) -> None:
        """New rows behind new prompts; `prompt_of_row` counts the new prompts only."""
        if self.prefixes is not None:
            empty = len(self.prefixes) - 1
            copied = np.where(self.prefixes.lengths[prefix_of_prompt] <= self.short_prefix, prefix_of_prompt, empty)
            if (copied != empty).any():
                prompts = prompts.behind(self.prefixes, copied)
            prefix_of_prompt = np.where(copied != empty, empty, prefix_of_prompt)
        offset = len(self.prefix_of_prompt)
        if self.prompts is None:
            self.prompts = prompts
        else:
            self.prompts.append(prompts)
        self.prefix_of_prompt = np.concatenate([self.prefix_of_prompt, prefix_of_prompt])
        self.prompt_of_row = np.concatenate([self.prompt_of_row, prompt_of_row + offset])
        self.t = np.concatenate([self.t, np.zeros_like(prompt_of_row)])
        self._reserve(0)
        self._arrange()

    def _reserve(self, room: int) -> None:
        """Make room for suffixes of so many tokens, and for the rows, unless it is there."""
        assert self.prompts is not None
        have = self.keys[0].shape if self.keys else (0, 0, 0, 0)
        if len(self) <= have[0] and room <= have[2]:
            return
        rows = max(len(self), have[0])
        block = BLOCK * (GPU_BLOCKS if torch.device(self.device).type == "cuda" else 1)
        room = have[2] if room <= have[2] else math.ceil((room + room // 8) / block) * block
        self.arrangement += 1
        for mine, like in ((self.keys, self.prompts.keys), (self.values, self.prompts.values)):
            new = [x.new_zeros(rows, x.shape[1], room, x.shape[3]) for x in like]
            for x, old in zip(new, mine, strict=False):
                x[: old.shape[0], :, : old.shape[2]] = old
            mine[:] = new

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows (increasing), and with the prompts that they still need."""
        assert self.prompts is not None
        first = int((np.arange(len(rows)) == rows).sum())  # these stay where they are
        width = int(self.t[rows].max(initial=0))
        index = torch.from_numpy(rows[first:]).to(self.device)
        if len(index) and width:
            for buffer in (*self.keys, *self.values):
                buffer[first : len(rows), :, :width] = buffer[index, :, :width]
        self.t = self.t[rows]
        needed, self.prompt_of_row = np.unique(self.prompt_of_row[rows], return_inverse=True)
        self.prefix_of_prompt = self.prefix_of_prompt[needed]
        if len(needed):
            self.prompts.select(needed)
        else:
            self.prompts = None
        self._arrange()

    def _arrange(self) -> None:
        """Bring rows and what they share together."""
        self._shared, self._at = [], None
        self.arrangement += 1
        if self.prefixes is not None and self.prompts is not None:
            prefix_of_row = self.prefix_of_prompt[self.prompt_of_row]
            used = slice(int(prefix_of_row.min()), int(prefix_of_row.max()) + 1)
            if self.prefixes.lengths[used].any():
                self._shared.append((self.prefixes.part(used), prefix_of_row - used.start))
        if self.prompts is not None:
            self._shared.append((self.prompts, self.prompt_of_row))
        self._sharing = [Sharing(owner, len(nodes), self.device) for nodes, owner in self._shared]
        self._lengths = [torch.from_numpy(nodes.lengths[owner]).to(self.device) for nodes, owner in self._shared]

    def make_room(self, n_tokens: int = 1, rows: np.ndarray | None = None) -> None:
        """What `begin` needs of the host; where it has been called already, `begin` is work of the device alone."""
        t = self.t if rows is None else self.t[rows]
        longest = int(t.max()) + n_tokens
        self._reserve(math.ceil(longest / READ) * READ + 1)
        partly = self.keys[0].device.type == "cpu" and self.keys[0].dtype == torch.float32
        width = min(self.room, math.ceil(longest / READ) * READ) if partly else self.room
        self.arrangement += width != self._width
        self._width = width
        if self._at is None:
            self._at = torch.from_numpy(self.t).to(self.device, copy=True)
        elif self._at_is_stale:
            self._at.copy_(torch.from_numpy(self.t))
        self._at_is_stale = False

    def begin(self, n_tokens: int = 1, rows: np.ndarray | None = None) -> Tensor:
        """The next forward pass reads n tokens of every row, or of these rows; returns their positions, (R, n).

        A row of less is padded, and `advance` counts what it really had.
        """
        self.make_room(n_tokens, rows)
        assert self._at is not None
        self._first, at, lengths, sharing = rows is None, self._at, self._lengths, self._sharing
        if rows is None:
            self._rows = torch.arange(len(self), device=self.device)
        else:
            self._rows = torch.from_numpy(rows).to(self.device)
            at, lengths = at[self._rows], [x[self._rows] for x in lengths]
            sharing = [Sharing(owner[rows], len(nodes), self.device) for nodes, owner in self._shared]
        self._next = at[:, None] + torch.arange(n_tokens, device=self.device)
        self._slots = torch.arange(self._width, device=self.device)
        self._before = list(zip((nodes for nodes, _ in self._shared), lengths, sharing, strict=True))
        self._masks: dict[int | None, Tensor] = {}
        return self._next + torch.stack(lengths).sum(0)[:, None]

    def layer(self, i: int) -> DecodeLayer:
        """What layer i reads and writes of the pass that `begin` has begun."""
        if self._asked is not None:
            self._asked.add(i)
        shared = [Shared(nodes.keys[i], nodes.values[i], t, sharing) for nodes, t, sharing in self._before]
        place = self._next, self._slots, shared, self._rows, self._first
        return DecodeLayer(self.keys[i], self.values[i], *place, self._masks)

    @contextmanager
    def watched(self) -> Iterator[set[int]]:
        """Inside, takes down which layers are asked for."""
        before, self._asked = self._asked, set()
        try:
            yield self._asked
        finally:
            self._asked = before

    def single_nodes(self) -> tuple[bool, ...] | None:
        """Of each source that rows share, whether it is a single node; None where the pass is not one token of all of
        several rows behind several prompts."""
        if not self._first or self._next.shape[1] > 1 or len(self) < 2 or self.prompts is None or len(self.prompts) < 2:
            return None
        return tuple(len(nodes) == 1 for nodes, _ in self._shared)

    def advance(self, n_tokens: int | np.ndarray = 1, rows: np.ndarray | None = None) -> None:
        """Count the tokens that the model has just read."""
        if rows is None and isinstance(n_tokens, int):
            self.advance_device(n_tokens)
            self.advance_host(n_tokens)
        else:
            self.t[slice(None) if rows is None else rows] += n_tokens
            self._at_is_stale = True

    def advance_device(self, n_tokens: int = 1) -> None:
        """The half of `advance`, for all rows, that a recorded step repeats."""
        assert self._at is not None
        self._at += n_tokens

    def advance_host(self, n_tokens: int = 1) -> None:
        """The other half."""
        self.t = self.t + n_tokens

    def set_back(self, row: int, t: int) -> None:
        """Forget a row's suffix behind its first t tokens."""
        if self.t[row] != t:
            self.t[row] = t
            self._at_is_stale = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.t.max(initial=0))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layer(layer_idx).update(key_states, value_states)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        return self.layer(layer).attend(layer, query, key, value, options)
