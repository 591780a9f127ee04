"""RMSNorm, rotary embeddings and gated activations in C++ against torch and float64; rows are their own, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rl_lora.kernels import elementwise, native_code
from rl_lora.kernels.native_code import dispatched
from tests.vectors import VECTORS

needs_ours = pytest.mark.skipif(elementwise.library() is None, reason="GCC, and AVX2 or AVX-512 are not here")
DTYPES = [torch.float32, torch.bfloat16]
FORMS = [(0.0, True), (0.0, False), (1.0, False)]
"""What is added to the weight of a norm, and whether it rounds twice."""
pytestmark = needs_ours


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(B: int, H: int, L: int, D: int, seed: int = 0) -> Tensor:
    """(B, H, L, D) in a memory of (B, L, H + 1, D)."""
    return randn(B, L, H + 1, D, seed=seed).transpose(1, 2)[:, :H]


def two_rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the modules of Llama compute it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_at_least_as_near_to_float64_as_torch(dtype: torch.dtype) -> None:
    """Values and gradients; in float32 within a little, as both differ by the order of a sum."""
    cos, sin = randn(2, 2, 30, 64, seed=9).to(dtype)
    weight = (randn(200).abs() + 0.5).to(dtype)
    q, k = heads(2, 5, 30, 64).to(dtype), heads(2, 2, 30, 64, seed=1).to(dtype)
    gate, up = 3 * randn(60, 200, seed=2).to(dtype), randn(60, 200, seed=3).to(dtype)
    chains: list[tuple[Callable[..., object], Callable[..., object], list[Tensor], list[Tensor]]] = [
        (
            partial(elementwise.rms_norm, eps=1e-6, rounds=True),
            partial(two_rounded_norm if dtype == torch.bfloat16 else elementwise.plain_rms_norm, eps=1e-6),
            [randn(60, 200).to(dtype)],
            [weight],
        ),
        (elementwise.rotary, elementwise.plain_rotary, [q, k], [cos, sin]),
    ]
    activations: tuple[elementwise.Activation, ...] = ("silu", "gelu_tanh")
    for name in activations:
        of = [partial(f, activation=name) for f in (elementwise.gated, elementwise.plain_gated)]
        chains.append((of[0], of[1], [gate, up], []))
    for ours, plain, given, constants in chains:
        exact_of = partial(elementwise.plain_rms_norm, eps=1e-6) if given[0].shape == (60, 200) and constants else plain
        results = []
        for compute, of_dtype in ((ours, dtype), (plain, dtype), (exact_of, torch.float64)):
            inputs = [x.to(of_dtype, copy=True).requires_grad_() for x in given]
            out = compute(*inputs, *(x.to(of_dtype) for x in constants))
            outs = [out] if isinstance(out, Tensor) else list(out)  # type: ignore[call-overload]
            grads = [randn(*x.shape, seed=5).to(dtype).to(of_dtype) for x in outs]
            results.append([x.detach() for x in (*outs, *torch.autograd.grad(outs, inputs, grads))])
        for mine, torchs, exact in zip(*results, strict=True):
            slack = 1.01 if dtype == torch.bfloat16 else 1.5
            assert mine.dtype == dtype
            assert error(mine, exact) <= slack * error(torchs, exact) + 1e-9


@pytest.mark.parametrize(("offset", "rounds"), FORMS)
@pytest.mark.parametrize("width", [8, 33, 576])
def test_norms_round_where_the_module_rounds(width: int, offset: float, rounds: bool) -> None:
    """In bfloat16 all but a few numbers are the module's own, to the bit; a weight may be float32."""
    x = randn(40, width).bfloat16()
    for weight in (randn(width, seed=1).bfloat16(), randn(width, seed=1)):
        if rounds and weight.dtype != x.dtype:
            continue
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        expected = weight * wide.bfloat16() if rounds else (wide * (offset + weight.float())).bfloat16()
        found = elementwise.rms_norm(x, weight, 1e-6, offset, rounds)
        assert (found == expected).float().mean() > 0.995


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    """To the bit, forward and backward, with one thread and with several."""
    rows = 1200
    weight, x, up, grad = randn(75).to(dtype), *(randn(rows, 75, seed=s).to(dtype) for s in (1, 2, 3))
    q, cos, sin = heads(rows, 3, 1, 30).to(dtype), randn(rows, 1, 30).to(dtype), randn(rows, 1, 30, seed=4).to(dtype)

    def results(of: slice) -> list[Tensor]:
        given = [t[of].clone().requires_grad_() for t in (x, x, up)]
        out = [elementwise.rms_norm(given[0], weight, 1e-6), elementwise.gated(given[1], given[2], "silu")]
        grads = torch.autograd.grad(out, given, [grad[of], grad[of]])
        return [*out, *grads, *elementwise.rotary(q[of], q[of], cos[of], sin[of])]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        all_rows = results(slice(None))
        torch.set_num_threads(1)
        for of in (slice(None), slice(0, 1), slice(17, 23), slice(rows - 1, None)):
            for found, expected in zip(results(of), all_rows, strict=True):
                assert torch.equal(found, expected[of])
    finally:
        torch.set_num_threads(threads)


def test_heads_lie_anywhere() -> None:
    """Any strides, one row of cosines for all, gradients that are not contiguous."""
    q, k, (cos, sin) = heads(3, 4, 7, 20), randn(3, 2, 7, 20, seed=1), randn(2, 1, 7, 20, seed=2)
    for query in (q, q.contiguous(), q.transpose(2, 3).contiguous().transpose(2, 3)):
        given = [query.clone().requires_grad_(), k.clone().requires_grad_()]
        ours, plain = (f(given[0], given[1], cos, sin) for f in (elementwise.rotary, elementwise.plain_rotary))
        grads = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (randn(3, 4, 7, 20), randn(3, 2, 7, 20))]
        found, expected = ([*out, *torch.autograd.grad(out, given, grads)] for out in (ours, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_numbers_of_any_size() -> None:
    x = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.0, -88.0, -200.0, torch.inf, torch.nan])
    found = elementwise.gated(x, torch.ones_like(x), "silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(x), equal_nan=True)
    big = torch.full((2, 24), 1e15)
    torch.testing.assert_close(elementwise.rms_norm(big, torch.ones(24), 1e-6), torch.ones(2, 24))
    for of_nothing in (
        elementwise.rms_norm(randn(0, 24), torch.ones(24), 1e-6),
        elementwise.gated(x[:0], x[:0], "silu"),
    ):
        assert of_nothing.numel() == 0


def test_tracers_see_one_operation_each() -> None:
    x, weight, q, cos = randn(4, 24), torch.ones(24), heads(4, 3, 1, 16), randn(4, 1, 16)

    def chain(x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        normed = elementwise.rms_norm(x, weight, 1e-6)
        return (elementwise.gated(normed, x, "silu"), *elementwise.rotary(q, q, cos, cos))

    with dispatched(), torch.inference_mode():
        graph = make_fx(chain, tracing_mode="fake", _allow_non_fake_inputs=True)(x, q)
        found = graph(x, q)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "rl_lora" in name] == [
        f"rl_lora.{name}.default" for name in ("rms_norm", "gated", "rotary")
    ]
    for a, b in zip(found, chain(x, q), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.fixture
def fresh_library() -> Iterator[None]:
    elementwise.library.cache_clear()
    yield
    elementwise.library.cache_clear()


@pytest.mark.parametrize("flag", [*(flag for _, flag in VECTORS), "-mno-avx512bf16", "-march=haswell"])
def test_vectors_of_other_processors(flag: str, monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    """The library is compared with float64 when it is loaded."""
    expected = elementwise.gated(randn(9, 21), randn(9, 21, seed=1), "silu")
    elementwise.library.cache_clear()
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    assert elementwise.library() is not None
    torch.testing.assert_close(elementwise.gated(randn(9, 21), randn(9, 21, seed=1), "silu"), expected)
