"""Attention over prompts that several completions share, for any model that goes through `AttentionInterface`.

Two layouts: `Packed` (a whole row at once: learning and prefill) and `Decode` (one new token a row, behind a prompt
that the rows of a group share and that is stored once). The model's own forward runs; only its attention is ours.
Models whose attention goes elsewhere (state space models, own kernels) take the plain path: see `Policy.not_shared`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

IMPLEMENTATION = "rl_lora_shared_prefix"


@dataclass
class Packed:
    """Rows of a prompt and its completions, as in `Batch`: positions, segments: int64 (B, L)."""

    positions: Tensor
    segments: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that the model's layers have asked for; None is full attention."""
        return set(self._masks)

    def mask(self, window: int | None) -> Tensor:
        """bool (B, 1, L, L), True where query i may attend to key j: earlier, same segment or shared, in the window."""
        if window not in self._masks:
            q, k = self.segments[:, :, None], self.segments[:, None, :]
            i = torch.arange(q.shape[1], device=q.device)
            mask = (i[:, None] >= i[None, :]) & ((q == k) | (k == 0)) & (q >= 0)
            if window is not None:
                mask &= self.positions[:, :, None] - self.positions[:, None, :] < window
            mask |= (i[:, None] == i[None, :]) & (q < 0)  # padding attends to itself: no row of the softmax is empty
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """query: (B, H, L, D); key, value: (B, H_kv, L, D). Returns (B, H, L, D)."""
        mask = self.mask(options.window)
        if options.softcap is None and options.sinks is None:
            if query.is_cuda:  # there, grouped heads with a mask would take the kernel that keeps all scores
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=options.scaling, enable_gqa=grouped
            )
        (B, H, L, D), H_kv = query.shape, key.shape[1]
        scores = query.reshape(B, H_kv, -1, D) @ key.transpose(-1, -2)  # (B, H_kv, H / H_kv * L, L)
        probabilities = softmax(scores.view(B, H, L, L), mask, options)
        return (probabilities.to(value.dtype).view(B, H_kv, -1, L) @ value).view(B, H, L, D)


class Prefix(Cache):
    """Keys and values of P prompts, as the prefill leaves them: a list over layers of (P, H_kv, L, D)."""

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


class Decode(Cache):
    """One new token for each of R rows: row r reads prompt `prompt[r]` of the prefix, and its own suffix.

    Args:
        prefix: the prefilled prompts. lengths: int64 (P,), their tokens; what is behind them is padding.
        prompt: int64 (R,), the prompt of each row.
        max_tokens: room for each suffix; allocated at the first token.
    """

    def __init__(self, prefix: Prefix, lengths: Tensor, prompt: Tensor, max_tokens: int):
        super().__init__(layers=[])
        self.prefix, self.lengths, self.max_tokens = prefix, lengths, max_tokens
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.t = 0
        """Tokens that each suffix holds already."""
        self._place(prompt)

    def _place(self, prompt: Tensor) -> None:
        """Lay rows out as (P, G) places, so that a prompt is multiplied with all of its rows at once."""
        self.prompt = prompt
        counts = torch.bincount(prompt, minlength=len(self.lengths))
        self.G = int(counts.max())
        order = torch.argsort(prompt, stable=True)
        within = torch.arange(len(prompt), device=prompt.device) - (counts.cumsum(0) - counts)[prompt[order]]
        self.place_of_row = torch.empty_like(prompt)
        self.place_of_row[order] = prompt[order] * self.G + within
        self.row_of_place = torch.zeros(len(self.lengths) * self.G, dtype=torch.int64, device=prompt.device)
        self.row_of_place[self.place_of_row] = torch.arange(len(prompt), device=prompt.device)
        self.regular = bool((self.place_of_row == torch.arange(len(prompt), device=prompt.device)).all()) and len(
            prompt
        ) == len(self.row_of_place)
        self._masks: dict[int | None, Tensor] = {}

    @property
    def positions(self) -> Tensor:
        """int64 (R, 1): the position of each row's next token."""
        return (self.lengths[self.prompt] + self.t)[:, None]

    def advance(self) -> None:
        """Count the token that the model has just read in."""
        self.t += 1
        self._masks.clear()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64, increasing), and with the prompts that they still need."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        prompts, prompt = self.prompt[rows].unique(return_inverse=True)
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            self.prefix.keys = [keys[prompts] for keys in self.prefix.keys]
            self.prefix.values = [values[prompts] for values in self.prefix.values]
        self._place(prompt)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.t

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new token's keys and values, (R, H_kv, 1, D), behind the suffix; return the suffix so far."""
        if layer_idx == len(self.keys):
            R, H_kv, _one, D = key_states.shape
            self.keys.append(key_states.new_zeros(R, H_kv, self.max_tokens, D))
            self.values.append(value_states.new_zeros(R, H_kv, self.max_tokens, value_states.shape[-1]))
        self.keys[layer_idx][:, :, self.t] = key_states[:, :, 0]
        self.values[layer_idx][:, :, self.t] = value_states[:, :, 0]
        return self.keys[layer_idx][:, :, : self.t + 1], self.values[layer_idx][:, :, : self.t + 1]

    def mask(self, window: int | None) -> Tensor:
        """bool (R, 1, 1, L + t + 1): which prompt and suffix tokens the new token may attend to."""
        if window not in self._masks:
            length = self.lengths[self.prompt][:, None]  # (R, 1)
            j = torch.arange(self.prefix.keys[0].shape[2], device=length.device)
            own = torch.arange(self.t + 1, device=length.device).expand(len(length), -1)
            mask = torch.cat([j < length, own >= 0], 1)
            if window is not None:
                positions = torch.cat([j.expand(len(length), -1), length + own], 1)
                mask &= self.positions - positions < window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """query: (R, H, 1, D); key, value: the suffixes, (R, H_kv, t + 1, D). Returns (R, H, 1, D)."""
        prefix_key, prefix_value = self.prefix.keys[layer], self.prefix.values[layer]  # (P, H_kv, L, D)
        (R, H, _, D), (P, H_kv, L, _) = query.shape, prefix_key.shape
        query = query.view(R, H_kv, -1, D)  # (R, H_kv, n, D): n query heads share a key-value head
        n = query.shape[2]
        shared = self._by_prompt(query, P) @ prefix_key.transpose(-1, -2)  # (P, H_kv, G * n, L)
        own = query @ key.transpose(-1, -2)  # (R, H_kv, n, t + 1)
        scores = torch.cat([self._by_row(shared, n), own], -1).view(R, H, 1, -1)
        probabilities = softmax(scores, self.mask(options.window), options).to(value.dtype).view(R, H_kv, n, -1)
        shared = self._by_row(self._by_prompt(probabilities[..., :L], P) @ prefix_value, n)
        return (shared + probabilities[..., L:] @ value).reshape(R, H, 1, -1)

    def _by_prompt(self, x: Tensor, P: int) -> Tensor:
        """(R, H_kv, n, X) -> (P, H_kv, G * n, X)"""
        x = x if self.regular else x[self.row_of_place]
        _, H_kv, n, X = x.shape
        return x.view(P, self.G, H_kv, n, X).transpose(1, 2).reshape(P, H_kv, self.G * n, X)

    def _by_row(self, x: Tensor, n: int) -> Tensor:
        """(P, H_kv, G * n, X) -> (R, H_kv, n, X)"""
        P, H_kv, _, X = x.shape
        x = x.view(P, H_kv, self.G, n, X).transpose(1, 2).reshape(P * self.G, H_kv, n, X)
        return x if self.regular else x[self.place_of_row]


@dataclass(frozen=True)
class Options:
    """What a model's attention asks for beside queries, keys and values."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    """(H,): a logit for each head that takes probability away from every key (gpt-oss)."""


def softmax(scores: Tensor, mask: Tensor, options: Options) -> Tensor:
    """float32 softmax over the last axis. scores: (B, H, Q, K), unscaled; mask: bool, broadcast to it."""
    scores = scores.float() * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is None:
        return torch.softmax(scores, -1)
    sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


UNDERSTOOD = {
    "sliding_window",
    "softcap",
    "s_aux",
    "layout",
    "position_ids",
    "use_cache",
    "is_causal",
    "cache_position",
}


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of `AttentionInterface`: (B, H, Q, D) -> (B, Q, H, D). `layout`: the forward's."""
    unknown = {name for name, value in kwargs.items() if value is not None} - UNDERSTOOD
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}")
    options = Options(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    layout: Packed | Decode = kwargs["layout"]
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer, query, key, value, options).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


@contextmanager
def shared_prefix_attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is `shared_prefix_attention`; its forward then needs a `layout`."""
    config = model.config
    previous = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = previous
