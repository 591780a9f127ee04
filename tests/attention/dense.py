"""Trees of spans, and dense attention in float64: the oracle of the tests of attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rl_lora.attention.tree import SpanTree
from rl_lora.kernels.attention_options import AttentionOptions


def random_spans(rng: np.random.Generator, n: int) -> list[tuple[int, int, int]]:
    """A forest at most three deep, in an order in which parents come first and siblings need not be neighbours."""
    spans: list[tuple[int, int, int]] = []
    depth: list[int] = []
    start = 0
    for i in range(n):
        parents = [j for j in range(i) if depth[j] < 2]
        parent = int(rng.choice([-1, *parents]))
        length = int(rng.integers(1, 7))
        spans.append((start, length, parent))
        depth.append(0 if parent < 0 else depth[parent] + 1)
        start += length
    return spans


def walk(rng: np.random.Generator, n: int) -> list[tuple[int, int, int]]:
    """A forest whose spans lie in the order of a walk through it, as packing lays them."""
    spans: list[tuple[int, int, int]] = []
    path: list[int] = []
    start = 0
    for i in range(n):
        del path[int(rng.integers(0, min(len(path), 3) + 1)) :]
        length = int(rng.integers(1, 7))
        spans.append((start, length, path[-1] if path else -1))
        path.append(i)
        start += length
    return spans


def allowed(tree: SpanTree, window: int | None) -> Tensor:
    """bool (N, N): own span up to here, and all ancestors."""
    in_line = np.eye(len(tree.spans), dtype=bool)  # whether a span is the other, or behind it
    for i, (_, _, parent) in enumerate(tree.spans):
        if parent >= 0:
            in_line[i] |= in_line[parent]
    span_of = np.repeat(np.arange(len(tree.spans)), [length for _, length, _ in tree.spans])
    mask = torch.from_numpy(in_line[span_of[:, None], span_of]).tril()
    position = tree.positions[0]
    return mask if window is None else mask & (position[:, None] - position < window)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """(H, N, D) x (H_kv, M, D) in float64."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ v
    return torch.softmax(scores, -1) @ v


OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=4),
    AttentionOptions(0.5, softcap=2.0),
    AttentionOptions(0.3, window=3, softcap=1.5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])),
]
