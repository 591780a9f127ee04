"""Attention on a tree of spans, fused by torch's `flex_attention`: for GPUs, after it has been verified there.

Spans lie in the order of a walk through the tree, so descendants are the neighbours of their ancestor, and two numbers
a token describe the mask: query q sees key k if k <= q < end[k], where the descendants of k's span stop at end[k]. Left
out: attention sinks, and trees that continue keys and values of an earlier pass; `padded.py` computes those.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rl_lora.attention.padded import padded_attention
from rl_lora.attention.tree import SpanTree
from rl_lora.kernels.attention_options import AttentionOptions
from rl_lora.kernels.verify import FastPath, require_close
from rl_lora.system.cache_folder import place_compiler_cache

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.05}  # float32 products may be TF32 on a GPU
"""Largest mean difference from padded attention and its gradients, in standard deviations."""
RECOMPILE_LIMIT = 64
MASK_BLOCK = 128
"""Tokens along each side of the blocks of scores that are computed or skipped."""


def supports(tree: SpanTree, query: Tensor, options: AttentionOptions) -> bool:
    """Whether `fused_attention` is faster here, and can express the mask."""
    return query.device.type == "cuda" and tree.past is None and options.sinks is None and tree.end is not None


def fused_attention(tree: SpanTree, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """query: (1, H, N, D); key, value: (1, H_kv, N, D). Returns (1, H, N, D)."""
    attention = _compiled() if query.device.type == "cuda" else flex_attention
    out = attention(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else soft_cap(options.softcap),
        block_mask=block_mask(tree, options.window),
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled() -> Any:
    place_compiler_cache()
    # One code object serves gradients or none, windows or none, and several sizes: each is a compilation of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)  # beyond the limit it raises, never runs slow


def soft_cap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def mask_mod(end: Tensor, positions: Tensor, window: int | None) -> MaskMod:
    """end, positions: int64 (N,). What `flex_attention` asks: whether token q sees token k."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    def seen_in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(b, h, q, k) & (positions[q] - positions[k] < (window or 0))

    return seen if window is None else seen_in_window


def block_mask(tree: SpanTree, window: int | None) -> BlockMask:
    """The blocks of MASK_BLOCK x MASK_BLOCK scores that have to be computed; kept with the tree, for all layers.

    It is derived from the bounds of blocks: the matrix of all pairs of tokens, which torch would read, is as large as
    the scores.
    """
    if window not in tree.block_masks:
        assert tree.end is not None
        mod = mask_mod(tree.end, tree.positions[0], window)
        needed, full = blocks(tree.end.cpu().numpy(), tree.positions[0].cpu().numpy(), window)
        parts, whole = (_first(some, tree.positions.device) for some in (needed & ~full, full))
        n = tree.n_tokens
        tree.block_masks[window] = BlockMask.from_kv_blocks(*parts, *whole, MASK_BLOCK, mod, (n, n))
    return tree.block_masks[window]


def blocks(end: np.ndarray, positions: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """bool (n, n) each: which blocks of queries see some of which blocks of keys, and which see all of them. With a
    window, blocks may be called needed that are not."""
    n = -(-len(end) // MASK_BLOCK)
    starts = np.arange(n) * MASK_BLOCK
    most, least = (f.reduceat(end, starts) for f in (np.maximum, np.minimum))
    earlier = starts[:, None] > starts
    needed = (earlier | np.eye(n, dtype=bool)) & (most > starts[:, None])
    full = earlier & (least >= starts[:, None] + MASK_BLOCK) & (starts[:, None] + MASK_BLOCK <= len(end))
    if window is not None:
        first, last = (f.reduceat(positions, starts) for f in (np.minimum, np.maximum))
        needed &= first[:, None] - last < window
        full &= last[:, None] - first < window
    return needed, full


def _first(some: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first: int32 (1, 1, n), (1, 1, n, n)."""
    counts, order = (
        torch.from_numpy(x.astype(np.int32)).to(device)[None, None]
        for x in (some.sum(1), np.argsort(~some, axis=1, kind="stable"))
    )
    return counts, order


_fast_paths: defaultdict[Any, FastPath] = defaultdict(
    lambda: FastPath("attention is not fused by torch's flex_attention")
)


def verified(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> bool:
    """Whether `fused_attention` and its gradients equal `padded_attention` on tensors of this kind; compared once."""
    differentiated = torch.is_grad_enabled() and query.requires_grad
    shapes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    path = _fast_paths[query.device, query.dtype, *shapes, options, differentiated]
    return path.verify(lambda: _compare(query, key, value, options, differentiated))


def _compare(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, differentiated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for lengths in ((40, 100, 30, 200, 90, 7), (300, 150, 1, 129, 80, 64)):
        parents = (-1, 0, 1, 1, 0, -1)
        starts = np.cumsum((0, *lengths[:-1])).tolist()
        tree = SpanTree(list(zip(starts, lengths, parents, strict=True)), query.device)
        given = [
            torch.randn(1, x.shape[1], tree.n_tokens, x.shape[3], generator=generator).to(x)
            for x in (query, key, value, query[..., : value.shape[3]])
        ]
        grad = given.pop()
        results = []
        for attention in (fused_attention, padded_attention):
            q, k, v = inputs = [x.detach().requires_grad_(differentiated) for x in given]
            # Hooks that count or drop what a pass keeps for its backward pass are not meant for this comparison.
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(differentiated),
                saved_tensors_hooks(lambda x: x, lambda x: x),
            ):
                out = attention(tree, q, k, v, options)
                gradients = torch.autograd.grad(out, inputs, grad) if differentiated else ()
            results.append((out, *gradients))
        for what, fused, plain in zip(("output", "dq", "dk", "dv"), *results, strict=False):
            tolerance = TOLERANCE.get(query.dtype, 0.05)
            require_close(f"its {what} differs from our own", fused.detach(), plain.detach(), tolerance)
