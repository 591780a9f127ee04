"""Attention on a tree of spans, forward and backward: padded by depth and in chunks here, or fused (`flex.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_lora import flex
from rl_lora.attention import Options, Source, attend_backward
from rl_lora.attention import attend as attend_to_sources

if TYPE_CHECKING:  # a tree calls what is here
    from rl_lora.tree import Chunk, Tree


def attend(tree: Tree, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """query: (1, H, N, D); key, value: (1, H_kv, N, D). Returns (1, H, N, D)."""
    if flex.serves(tree, query, options) and flex.proven(query, key, value, options, own):
        return flex.attend(tree, query, key, value, options)
    return own(tree, query, key, value, options, layer)


def own(tree: Tree, query: Tensor, key: Tensor, value: Tensor, options: Options, layer: int = 0) -> Tensor:
    """Our own; `layer` says which keys and values of a tree's past are meant."""
    return _Own.apply(query, key, value, tree, layer, options)


class _Own(torch.autograd.Function):
    """Keeps queries, keys and values only; gathers tokens into padded spans, never scatters."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, layer: int, options: Options
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.options = tree, options
        q, k, v = ([tree.padded(x, d) for d in range(len(tree.depths))] for x in (query, key, value))
        out = [x.new_empty(*x.shape[:3], value.shape[-1]) for x in q]
        for chunk, of_chunk, sources in _pieces(tree, layer, q, k, v):
            mask = tree.mask(chunk, options.window)
            out[chunk.depth][chunk.blocks, :, chunk.queries] = attend_to_sources(of_chunk, sources, mask, options)
        return tree.flat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tree, options = ctx.tree, ctx.options
        assert tree.past is None
        q, k, v, g = ([tree.padded(x, d) for d in range(len(tree.depths))] for x in (*ctx.saved_tensors, grad))
        for x, depth in zip(g, tree.depths, strict=True):
            x.masked_fill_(depth.padding[:, None, :, None], 0)  # what stands there would reach keys and values
        # A prompt's keys hear from every completion: their sum is kept in float32.
        dq, dk, dv = (
            [torch.zeros_like(x, dtype=torch.float32 if float32 else None) for x in xs]
            for xs, float32 in ((q, False), (k, True), (v, True))
        )
        for chunk, of_chunk, sources in _pieces(tree, 0, q, k, v):
            mask = tree.mask(chunk, options.window)
            dout = g[chunk.depth][chunk.blocks, :, chunk.queries]
            dq_chunk, of_sources = attend_backward(of_chunk, sources, mask, options, dout)
            dq[chunk.depth][chunk.blocks, :, chunk.queries] = dq_chunk
            for (a, nodes, n_keys, _), (dkey, dvalue) in zip(chunk.sources, of_sources, strict=True):
                dk[a][nodes, :, :n_keys] += dkey
                dv[a][nodes, :, :n_keys] += dvalue
        return tree.flat(dq), tree.flat(dk).to(k[0].dtype), tree.flat(dv).to(v[0].dtype), None, None, None


def _pieces(
    tree: Tree, layer: int, q: list[Tensor], k: list[Tensor], v: list[Tensor]
) -> Iterator[tuple[Chunk, Tensor, list[Source]]]:
    """Every chunk, with its queries and its sources."""
    for chunk in tree.chunks(q[0].shape[1]):
        sources = []
        for a, nodes, n_keys, sharing in chunk.sources:
            if a < 0:  # the past
                assert tree.past is not None
                sources.append(Source(tree.past.keys[layer], tree.past.values[layer], sharing))
            else:
                sources.append(Source(k[a][nodes, :, :n_keys], v[a][nodes, :, :n_keys], sharing))
        yield chunk, q[chunk.depth][chunk.blocks, :, chunk.queries], sources
