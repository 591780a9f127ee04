"""Attention on a tree in C++, and its gradients, against a dense mask in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lora.attention import cpu
from rl_lora.attention.interface import attend_on_tree
from rl_lora.attention.kv_cache import KeyValues
from rl_lora.attention.padded import padded_attention
from rl_lora.attention.tree import SpanTree
from rl_lora.kernels import native_code, tree_attention
from rl_lora.kernels.attention_options import AttentionOptions
from tests.attention.dense import allowed, dense, walk
from tests.vectors import VECTORS

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(
    tree_attention.library(torch.float32) is None, reason="GCC, and AVX2 or AVX-512 are not here"
)

OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=4),
    AttentionOptions(0.3, window=40),
    AttentionOptions(0.3, window=1 << 40),
    AttentionOptions(0.5, softcap=2.0),
    AttentionOptions(0.3, window=11, softcap=1.5, sinks=torch.linspace(-3, 2, 12)),
]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def long_walk(seed: int, n: int = 12) -> SpanTree:
    """Some spans are a token long, and some longer than what is worked on at a time."""
    rng = np.random.default_rng(seed)
    spans = walk(rng, n)
    lengths = [length * int(rng.choice([1, 1, 5, 12])) for _, length, _ in spans]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return SpanTree([(start, n, parent) for start, n, (_, _, parent) in zip(starts, lengths, spans, strict=True)])


def random(
    tree: SpanTree,
    dtype: torch.dtype,
    seed: int,
    heads: int = 6,
    key_heads: int = 2,
    width: int = 32,
    value_width: int = 0,
) -> list[Tensor]:
    """Queries, keys, values, and a gradient of what comes out; in the memory order that models make them in."""
    g = torch.Generator().manual_seed(seed)
    sizes = (heads, width), (key_heads, width), (key_heads, value_width or width), (heads, value_width or width)
    return [torch.randn(1, tree.n_tokens, h, d, generator=g).to(dtype).transpose(1, 2) for h, d in sizes]


def attend(tree: SpanTree, given: list[Tensor], options: AttentionOptions) -> list[Tensor]:
    """What comes out, and gradients of queries, keys and values."""
    assert cpu.supports(tree, *given[:3])
    return with_gradients(lambda q, k, v: attend_on_tree(tree, 0, q, k, v, options), given)


def attend_by_torch(tree: SpanTree, given: list[Tensor], options: AttentionOptions) -> list[Tensor]:
    return with_gradients(lambda q, k, v: padded_attention(tree, q, k, v, options), given)


def attend_exactly(tree: SpanTree, given: list[Tensor], options: AttentionOptions) -> list[Tensor]:
    mask = allowed(tree, options.window)
    return with_gradients(lambda q, k, v: dense(q[0], k[0], v[0], mask, options)[None], [x.double() for x in given])


def with_gradients(attention: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    *inputs, grad = given
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def of_heads(options: AttentionOptions, heads: int) -> AttentionOptions:
    return options if options.sinks is None else replace(options, sinks=options.sinks[:heads])


def assert_right(tree: SpanTree, given: list[Tensor], options: AttentionOptions) -> None:
    """In float32 as far as that goes; in bfloat16 no further off than torch is."""
    found, exact = attend(tree, given, options), attend_exactly(tree, given, options)
    by_torch = found if given[0].dtype == torch.float32 else attend_by_torch(tree, given, options)
    for x, y, z in zip(found, exact, by_torch, strict=True):
        assert x.dtype == given[0].dtype
        if x.dtype == torch.float32:
            torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=1e-4)
        else:
            error, usual = ((found - y).abs() for found in (x, z))
            assert error.mean() <= 1.02 * usual.mean()
            assert error.max() <= 2 * usual.max()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_attention_and_so_are_its_gradients(dtype: torch.dtype, options: AttentionOptions, seed: int) -> None:
    tree = long_walk(seed)
    given, options = random(tree, dtype, seed), of_heads(options, 6)
    assert_right(tree, given, options)


@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "value_width"), [(9, 3, 64, 0), (12, 1, 80, 0), (4, 4, 16, 48)]
)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
def test_heads_of_any_number_and_width(
    dtype: torch.dtype, options: AttentionOptions, heads: int, key_heads: int, width: int, value_width: int
) -> None:
    tree, options = long_walk(7), of_heads(options, heads)
    given = random(tree, dtype, 0, heads, key_heads, width, value_width)
    assert_right(tree, given, options)
    contiguous = [x.contiguous() for x in given]  # in another memory order
    for x, y in zip(attend(tree, contiguous, options), attend(tree, given, options), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_it_is_the_same_whatever_the_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    """To the bit from call to call; sums over queries are split differently, so other numbers of threads may round."""
    tree, options = long_walk(3, 30), OPTIONS[0]
    given, before = random(tree, dtype, 0), torch.get_num_threads()
    expected = attend(tree, given, options)
    try:
        torch.set_num_threads(threads)
        found, again = attend(tree, given, options), attend(tree, given, options)
    finally:
        torch.set_num_threads(before)
    for x, y, z in zip(found, again, expected, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 2**-7)
    assert torch.equal(found[0], expected[0])


def test_a_single_token_sees_itself(dtype: torch.dtype) -> None:
    tree = SpanTree([(0, 1, -1)])
    given = random(tree, dtype, 0)
    out, dq, dk, dv = attend(tree, given, AttentionOptions(1.0))
    torch.testing.assert_close(out, given[2].repeat_interleave(3, 1))
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, given[3].float().unflatten(1, (2, 3)).sum(2).to(dtype))


def test_what_has_become_of_one_tree_does_not_reach_another(dtype: torch.dtype) -> None:
    """Not finite numbers either: it may be another adapter's."""
    tree, options = SpanTree([(0, 5, -1), (5, 7, 0), (12, 3, -1), (15, 9, 2), (24, 2, -1)]), OPTIONS[0]
    given = random(tree, dtype, 1)
    expected = attend(tree, given, options)
    for x in given:
        x[:, :, 12:24] = torch.nan
    for x, y in zip(attend(tree, given, options), expected, strict=True):
        assert torch.equal(x[:, :, :12], y[:, :, :12])
        assert torch.equal(x[:, :, 24:], y[:, :, 24:])
        assert x[:, :, 12:24].isnan().all()


@pytest.mark.parametrize("scaling", [300.0, -300.0])
def test_scores_of_any_size_make_probabilities(dtype: torch.dtype, scaling: float) -> None:
    tree = long_walk(2)
    q, k, v, grad = random(tree, dtype, 2)
    v = torch.ones_like(v)
    out, *gradients = attend(tree, [q, k, v, grad], AttentionOptions(scaling))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6 if dtype == torch.float32 else 2**-8, rtol=0)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("offset", [-1000.0, -300.0, -88.7, 88.7, 1000.0])
def test_what_all_scores_have_in_common_changes_nothing(dtype: torch.dtype, offset: float) -> None:
    """A large bias of the keys is not rare: errors stay about as small as torch's, also where lanes have no query."""
    tree, options = SpanTree([(0, 5, -1), (5, 30, 0), (35, 2, 0)]), AttentionOptions(1.0)
    given = random(tree, dtype, 0)
    given[0][..., 0], given[1][..., 0] = 1, offset
    exact = attend_exactly(tree, given, options)
    by_torch = attend_by_torch(tree, given, options)
    for x, y, z in zip(attend(tree, given, options), by_torch, exact, strict=True):
        error, usual = ((found - z).abs().max() for found in (x, y))
        assert error <= 3 * usual + 1e-6 * z.abs().max()


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 50])
def test_lanes_without_a_query_leave_no_trace(dtype: torch.dtype, n_tokens: int) -> None:
    """Wherever a score that they do not have would lie beside those of the others."""
    tree = SpanTree([(0, n_tokens, -1)])
    given = random(tree, dtype, 0, width=16)
    given[0][..., 0] = 1
    for offset in torch.arange(-200, 200, 0.5).tolist():
        given[1][..., 0] = offset
        assert all(x.isfinite().all() for x in attend(tree, given, AttentionOptions(1.0)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_roots_go_on_behind_an_earlier_pass(
    dtype: torch.dtype, options: AttentionOptions, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several nodes of it, one of them empty, as prompts go on behind what they begin with."""
    rng, g, options = np.random.default_rng(seed), torch.Generator().manual_seed(seed), of_heads(options, 6)
    keys, values = ([torch.randn(4, 2, 23, 32, generator=g).to(dtype)] for _ in range(2))
    past = KeyValues(keys, values, np.array([23, 0, 7, 1]))
    lengths = rng.choice([1, 3, 40], 9)
    starts, node = np.cumsum(lengths) - lengths, rng.integers(0, 4, 9).tolist()
    spans = [(int(start), int(n), -1) for start, n in zip(starts, lengths, strict=True)]
    tree = SpanTree(spans, past=past, past_of_span=node)
    q, k, v, _ = random(tree, dtype, seed)
    assert cpu.supports(tree, q, k, v)
    monkeypatch.setattr("rl_lora.attention.interface.padded_attention", None)
    out = attend_on_tree(tree, 0, q, k, v, options)
    exact = torch.empty_like(out, dtype=torch.float64)
    for (start, n, _), of in zip(spans, node, strict=True):
        t, own = past.lengths[of], slice(start, start + n)
        key, value = (
            torch.cat([x[of, :, :t], y[0, :, own]], 1).double() for x, y in ((past.keys[0], k), (past.values[0], v))
        )
        behind = torch.arange(t, t + n)[:, None] - torch.arange(t + n)
        mask = (behind >= 0) & (behind < (options.window or t + n))
        exact[0, :, own] = dense(q[0, :, own].double(), key, value, mask, options)
    by_torch = padded_attention(tree, q, k, v, options)
    error, usual = ((x - exact).abs().mean() for x in (out, by_torch))
    assert error <= 1.05 * usual + 1e-6


def test_parts_of_the_queries_keep_threads_busy_and_are_few() -> None:
    for threads in range(1, 130):
        for key_heads in (1, 2, 3, 4, 8, 12, 32):
            parts = tree_attention.parts_of(threads, key_heads)
            rounds = -(-parts * key_heads // threads)
            assert threads * rounds <= 1.1 * parts * key_heads
    assert [tree_attention.parts_of(*x) for x in ((1, 3), (2, 3), (2, 8), (64, 8), (63, 8))] == [1, 2, 1, 8, 15]


@pytest.mark.parametrize("flag", [*(flag for _, flag in VECTORS), "-mno-avx512bf16"])
def test_vectors_of_other_processors(dtype: torch.dtype, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree_attention.library.cache_clear()
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    try:
        for seed, width in ((4, 32), (5, 48)):  # a number of whole panels, and not
            tree = long_walk(seed)
            given, options = random(tree, dtype, seed, width=width), of_heads(OPTIONS[3 - seed], 6)
            assert_right(tree, given, options)
    finally:
        tree_attention.library.cache_clear()


def test_what_it_does_not_support_is_left_to_torch(dtype: torch.dtype) -> None:
    tree = long_walk(0)
    q, k, v, _ = random(tree, dtype, 0)
    supports = cpu.supports
    assert supports(tree, q, k, v)
    for other in (torch.float64, torch.float16, torch.device("meta")):
        assert not supports(tree, q.to(other), k.to(other), v.to(other))
    no_walk = SpanTree([(0, 2, -1), (2, 2, -1), (4, 1, 0)])
    assert not supports(no_walk, *random(no_walk, dtype, 0)[:3])
    assert not supports(tree, q, k, v.to(next(other for other in DTYPES if other != dtype)))
    assert not supports(tree, q[:, :5], k, v)
    assert not supports(tree, q, k, v[:, :1])
    assert not supports(tree, q, k[:, :, 1:], v[:, :, 1:])
    assert not supports(tree, q, k[..., :16], v)
    assert not supports(tree, *(torch.cat([x, x], 0) for x in (q, k, v)))
    assert not supports(tree, *(torch.cat([x, x], 2) for x in (q, k, v)))
    q, k, v = (x[..., :12] for x in (q, k, v))
    assert not supports(tree, q, k, v)
    assert torch.equal(attend_on_tree(tree, 0, q, k, v, OPTIONS[1]), padded_attention(tree, q, k, v, OPTIONS[1]))


def test_without_the_code_it_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, options = long_walk(5), OPTIONS[1]
    q, k, v, _ = random(tree, dtype, 5)
    ours = attend_on_tree(tree, 0, q, k, v, options)
    monkeypatch.setattr(tree_attention, "library", lambda dtype: None)
    theirs = attend_on_tree(tree, 0, q, k, v, options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(load(&of_scores[i]) - mean)", "load(&of_scores[i])"),  # gradients of probabilities, not of scores
        ("call.window ? call.window : INT32_MAX", "INT32_MAX"),
        ("token[half] < int32_t(ends[key])", "token[half] >= 0"),  # siblings
        ("add(0, call.past_length[node], 0, node)", "add(1, call.past_length[node], 0, node)"),
    ],
)
def test_code_that_computes_something_else_is_not_used(
    dtype: torch.dtype, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, found = tree_attention.SOURCE, 0
    for path in (source, *source.parent.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        found += text.count(right)
        (tmp_path / path.name).write_text(text.replace(right, wrong), encoding="utf-8")
    assert found == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tree_attention, "SOURCE", tmp_path / source.name)
    tree_attention.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="left to torch: in C\\+\\+ its .* differs"):
            assert tree_attention.library(dtype) is None
    finally:
        tree_attention.library.cache_clear()
