"""Attention on a tree of spans by the C++ of `kernels/tree_attention.py`, in float32 or bfloat16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lora.attention.tree import SpanTree
from rl_lora.kernels import tree_attention
from rl_lora.kernels.attention_options import AttentionOptions
from rl_lora.kernels.tree_attention import Past, Spans


def supports(tree: SpanTree, query: Tensor, key: Tensor, value: Tensor, *, layer: int = 0) -> bool:
    """Whether `native_attention` may be called with these: on a CPU, of one dtype that the C++ knows."""
    if query.dtype not in tree_attention.ELEMENTS or tree.end is None:
        return False
    past = [] if tree.past is None else [tree.past.keys[layer], tree.past.values[layer]]
    for x in (query, key, value, *past):
        if x.dtype != query.dtype or x.device.type != "cpu" or x.shape[3] % tree_attention.WIDTHS:
            return False
    if any(x.shape[0] != 1 or x.shape[2] != tree.n_tokens for x in (query, key, value)):
        return False
    if query.shape[3] != key.shape[3] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        return False
    if any(x.shape[1::2] != own.shape[1::2] for x, own in zip(past, (key, value), strict=False)):
        return False
    return tree_attention.library(query.dtype) is not None


def native_attention(
    tree: SpanTree, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, layer: int = 0
) -> Tensor:
    """query: (1, H, N, D); key: (1, H_kv, N, D); value: (1, H_kv, N, D_v). Returns (1, H, N, D_v).

    layer: which keys and values of the tree's past are meant. Behind a past there are no gradients.
    """
    assert tree.end is not None
    spans = Spans(tree.table, tree.end, tree.positions[0])
    past = None
    if tree.past is not None:
        lengths = torch.from_numpy(tree.past.lengths)
        past = Past(tree.past.keys[layer], tree.past.values[layer], lengths, tree.past_of_span)
    return tree_attention.tree_attention(query, key, value, spans, options, past)
