"""Products with packed weights against float64, and when weights are packed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lora import frozen_linear
from rl_lora.frozen_linear import MOST_ROWS, FrozenLinear, _operators, may_pack
from rl_lora.lora import LoRALinear
from tests.oracles import tiny_policy
from tests.tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [1, 2, 3, 17, 64, 129, MOST_ROWS, MOST_ROWS + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(7, 5), (192, 576), (576, 1536), (1, 64)])
def test_it_is_the_product_whatever_the_number_of_rows(dtype: torch.dtype, biased: bool, n_out: int, n_in: int) -> None:
    g = torch.Generator().manual_seed(n_out)
    weight = torch.randn(n_out, n_in, generator=g).to(dtype)
    bias = torch.randn(n_out, generator=g).to(dtype) if biased else None
    layer = FrozenLinear(weight, bias, may_pack=True)
    for n in (*ROWS, 5):
        x = torch.randn(n, n_in, generator=g).to(dtype)
        with torch.inference_mode():
            found = layer(x)
            again = layer(x.t().contiguous().t())  # in another memory order
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert found.shape == exact.shape
        assert found.dtype == dtype
        atol = 64 * torch.finfo(dtype).eps * math.sqrt(n_in)
        torch.testing.assert_close(found.double(), exact, atol=atol, rtol=torch.finfo(dtype).eps)
        torch.testing.assert_close(again, found, atol=atol, rtol=torch.finfo(dtype).eps)


def test_gradients_go_through_it() -> None:
    layer = FrozenLinear(torch.randn(6, 5), may_pack=True)
    with torch.no_grad():
        layer(torch.ones(3, 5))
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 5))


def test_a_weight_that_was_written_to_is_packed_anew() -> None:
    layer = FrozenLinear(torch.randn(6, 5), may_pack=True)
    x = torch.randn(3, 5)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the library is not part of this torch")
def test_where_the_library_is_there_it_is_used() -> None:
    assert _operators(torch.float32) is not None
    assert _operators(torch.float16) is None


@pytest.mark.parametrize("wrong", ["product", "missing"])
def test_an_operator_that_computes_something_else_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * F.linear(x, weight, bias)

    def missing() -> None:
        raise AttributeError("no such operator")

    operators = {"product": lambda: (lambda weight: weight, twice), "missing": missing}[wrong]
    monkeypatch.setattr(frozen_linear, "_mkl", operators)
    _operators.cache_clear()
    try:
        layer = FrozenLinear(torch.randn(6, 5), may_pack=True)
        x = torch.randn(3, 5)
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight))
        assert not layer.may_pack
    finally:
        _operators.cache_clear()


def test_weights_are_packed_where_there_is_memory_for_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    needed = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    for free, expected in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(frozen_linear, "free_bytes", lambda device, free=free: free)
        assert may_pack(model) == expected
    with torch.device("meta"):
        assert not may_pack(torch.nn.Linear(3, 4))


def test_layers_of_a_bank_pack() -> None:
    policy = tiny_policy("llama", ["a"])
    assert policy.bank.may_pack
    layers = [m for m in policy.model.modules() if isinstance(m, LoRALinear)]
    assert layers
    assert all(layer.product is not None and layer.product.may_pack for layer in layers)
