"""Attention on a tree of spans by the C++ of `kernels/tree_attention.py`, in float32 on a CPU.

Left out: trees that continue keys and values of an earlier pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lora.attention.tree import SpanTree
from rl_lora.kernels import tree_attention
from rl_lora.kernels.attention_options import AttentionOptions
from rl_lora.kernels.tree_attention import Spans


def supports(tree: SpanTree, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `native_attention` may be called with these: float32, on a CPU, behind no keys of an earlier pass."""
    for x in (query, key, value):
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[3] % tree_attention.WIDTHS:
            return False
        if x.shape[0] != 1 or x.shape[2] != tree.n_tokens:
            return False
    if query.shape[3] != key.shape[3] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        return False
    return tree.past is None and tree.end is not None and tree_attention.library() is not None


def native_attention(tree: SpanTree, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """query: (1, H, N, D); key: (1, H_kv, N, D); value: (1, H_kv, N, D_v). Returns (1, H, N, D_v)."""
    assert tree.end is not None
    spans = Spans(tree.table, tree.end, tree.positions[0])
    return tree_attention.tree_attention(query, key, value, spans, options)
