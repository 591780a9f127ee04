"""Attention on a tree of spans, forward and backward, by plain operations of torch.

Spans are padded by depth and computed in chunks. Every tree, dtype and device is supported: the fused implementation is
compared with this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rl_lora.attention.shared_prefix import KeySource, attend_to_sources, attend_to_sources_backward
from rl_lora.attention.tree import Chunk, SpanTree
from rl_lora.kernels.attention_options import AttentionOptions


def padded_attention(
    tree: SpanTree, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, layer: int = 0
) -> Tensor:
    """query: (1, H, N, D); key, value: (1, H_kv, N, D). Returns (1, H, N, D).

    layer: which keys and values of the tree's past are meant.
    """
    return _PaddedAttention.apply(query, key, value, tree, layer, options)


class Padded:
    """Vectors of the tokens of a tree, (H, N, D), by depth: `parts` are (H_kv, n, H / H_kv, L, D), one behind the other
    in memory, so that one gathering pads them and one takes them back."""

    def __init__(self, tree: SpanTree, rows: Tensor, heads: int, kv_heads: int):
        self.tree, self.rows, self.heads, self.kv_heads = tree, rows, heads, kv_heads
        self.parts: list[Tensor] = []
        sizes = [(kv_heads, len(depth.tokens), heads // kv_heads, depth.tokens.shape[1]) for depth in tree.depths]
        for size, part in zip(sizes, rows.split([math.prod(size) for size in sizes]), strict=True):
            self.parts.append(part.view(*size, -1))

    @classmethod
    def of(cls, tree: SpanTree, x: Tensor, kv_heads: int) -> Padded:
        """x: (1, H, N, D)."""
        heads = x.shape[1]
        tokens = x[0].transpose(0, 1).reshape(-1, x.shape[-1])  # (N * H, D), which is how it usually lies in memory
        return cls(tree, tokens[tree.places(heads, kv_heads)[0]], heads, kv_heads)

    def like(self, dim: int, dtype: torch.dtype | None = None, *, zero: bool = False) -> Padded:
        """The same layout with another last dimension, of zeros, or not initialised."""
        make = torch.zeros if zero else torch.empty
        rows = make(len(self.rows), dim, dtype=dtype or self.rows.dtype, device=self.rows.device)
        return Padded(self.tree, rows, self.heads, self.kv_heads)

    def flat(self, dtype: torch.dtype | None = None) -> Tensor:
        """(1, H, N, D), in the memory order of (1, N, H, D)."""
        rows = self.rows[self.tree.places(self.heads, self.kv_heads)[1]].to(dtype or self.rows.dtype)
        return rows.view(1, -1, self.heads, rows.shape[-1]).transpose(1, 2)


class _PaddedAttention(torch.autograd.Function):
    """Keeps queries, keys and values only; gathers tokens into padded spans, never scatters."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: SpanTree, layer: int, options: AttentionOptions
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.options = tree, options
        q, k, v = (Padded.of(tree, x, key.shape[1]) for x in (query, key, value))
        out = q.like(value.shape[-1])
        for chunk, of_chunk, sources in _pieces(tree, layer, q, k, v):
            found = attend_to_sources(of_chunk, sources, tree.mask(chunk, options.window), _of_chunk(options, chunk))
            _part(out, chunk).copy_(_heads_apart(found, chunk))
        return out.flat()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tree, options = ctx.tree, ctx.options
        assert tree.past is None
        query, key, value = ctx.saved_tensors
        kv_heads = key.shape[1]
        q, k, v, g = (Padded.of(tree, x, kv_heads) for x in (query, key, value, grad))
        for x, padding in zip(g.parts, tree.paddings, strict=True):
            if padding is not None:  # what stands there would reach keys and values
                x.masked_fill_(padding[:, None, :, None], 0)
        # A prompt's keys hear from every completion: their sum is kept in float32.
        dq = q.like(q.rows.shape[-1])
        dk, dv = (x.like(x.rows.shape[-1], torch.float32, zero=True) for x in (k, v))
        for chunk, of_chunk, sources in _pieces(tree, 0, q, k, v):
            mask = tree.mask(chunk, options.window)
            dout = _part(g, chunk).flatten(0, 1)
            dq_chunk, of_sources = attend_to_sources_backward(of_chunk, sources, mask, _of_chunk(options, chunk), dout)
            _part(dq, chunk).copy_(_heads_apart(dq_chunk, chunk))
            for (a, nodes, n_keys, _), (dkey, dvalue) in zip(chunk.sources, of_sources, strict=True):
                dk.parts[a][:, nodes, 0, :n_keys] += dkey.view(kv_heads, -1, *dkey.shape[2:])
                dv.parts[a][:, nodes, 0, :n_keys] += dvalue.view(kv_heads, -1, *dvalue.shape[2:])
        return dq.flat(), dk.flat(k.rows.dtype), dv.flat(v.rows.dtype), None, None, None


def _part(x: Padded, chunk: Chunk) -> Tensor:
    """(H_kv, blocks, H / H_kv, queries, D)"""
    return x.parts[chunk.depth][:, chunk.blocks, :, chunk.queries]


def _heads_apart(x: Tensor, chunk: Chunk) -> Tensor:
    """(H_kv * blocks, H / H_kv, queries, D) -> (H_kv, blocks, H / H_kv, queries, D)"""
    return x.view(chunk.kv_heads, -1, *x.shape[1:])


def _of_chunk(options: AttentionOptions, chunk: Chunk) -> AttentionOptions:
    """The options with the sinks of each block's heads."""
    if options.sinks is None:
        return options
    blocks = chunk.blocks.stop - chunk.blocks.start
    return replace(options, sinks=options.sinks.view(chunk.kv_heads, -1).repeat_interleave(blocks, 0))


def _pieces(
    tree: SpanTree, layer: int, q: Padded, k: Padded, v: Padded
) -> Iterator[tuple[Chunk, Tensor, list[KeySource]]]:
    """Every chunk, with its queries, (H_kv * blocks, H / H_kv, queries, D), and sources, (H_kv * nodes, 1, keys, D)."""
    for chunk in tree.chunks(q.heads, k.heads):
        sources = []
        for a, nodes, n_keys, sharing in chunk.sources:
            if a < 0:  # the past
                assert tree.past is not None
                of_past = tree.past.keys[layer], tree.past.values[layer]
                key, value = (x.transpose(0, 1).flatten(0, 1)[:, None] for x in of_past)
            else:
                key, value = (x.parts[a][:, nodes, :, :n_keys].flatten(0, 1) for x in (k, v))
            sources.append(KeySource(key, value, sharing))
        yield chunk, _part(q, chunk).flatten(0, 1), sources
