"""Attention on a tree of spans is attention with a dense mask, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_lora.attention import tree as tree_module
from rl_lora.attention.interface import attend_on_tree
from rl_lora.attention.tree import SpanTree, ends
from rl_lora.kernels.attention_options import AttentionOptions
from tests.attention.dense import OPTIONS, allowed, dense, random_spans


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1 << 25, 60])
@pytest.mark.parametrize("seed", range(3))
def test_tree_attention_and_its_gradient_are_those_of_a_dense_mask(seed, chunk, options, monkeypatch):
    monkeypatch.setattr(tree_module, "CHUNK_ELEMENTS", chunk)  # 60: single blocks, and single queries of them
    rng = np.random.default_rng(seed)
    tree = SpanTree(random_spans(rng, 9))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, tree.n_tokens, 5, generator=g, requires_grad=True) for h in (4, 2, 2))
    out = attend_on_tree(tree, 0, q, k, v, options)
    grad = torch.randn(out.shape, generator=g)
    out.backward(grad)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = dense(q64[0], k64[0], v64[0], allowed(tree, options.window), options)
    expected.backward(grad[0].double())
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-4)
    for x, x64 in ((q, q64), (k, k64), (v, v64)):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_float64_within_its_rounding():
    rng = np.random.default_rng(0)
    tree = SpanTree(random_spans(rng, 12))
    q, k, v = (torch.randn(1, h, tree.n_tokens, 16).bfloat16().requires_grad_() for h in (4, 2, 2))
    out = attend_on_tree(tree, 0, q, k, v, AttentionOptions(0.25))
    out.sum().backward()
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = dense(q64[0], k64[0], v64[0], allowed(tree, None), AttentionOptions(0.25))
    expected.sum().backward()
    assert (out[0] - expected).abs().max() < 0.03
    for x, x64 in ((q, q64), (k, k64), (v, v64)):
        assert x.grad is not None
        assert x64.grad is not None
        assert (x.grad - x64.grad).abs().mean() < 0.02 * x64.grad.abs().mean()


def test_spans_out_of_a_walks_order_are_known_as_such():
    assert ends([(0, 2, -1), (2, 2, -1), (4, 1, 0)]) is None  # a child that is not behind its parent
    assert ends([(2, 2, -1), (0, 2, -1)]) is None  # tokens in another order than spans
    found = ends([(0, 2, -1), (2, 3, 0), (5, 1, 0), (6, 2, -1)])
    assert found is not None
    assert found.tolist() == [6, 6, 5, 5, 5, 6, 8, 8]
