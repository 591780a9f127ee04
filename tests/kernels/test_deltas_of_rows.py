"""The deltas of adapters beside products, where no memory is left for packed weights, or what is given does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rl_lora.kernels import packed_gemm
from rl_lora.kernels.adapted_linear import serves
from rl_lora.kernels.frozen_linear import FrozenLinear, join_products
from rl_lora.kernels.native_code import dispatched
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.lora.routing import MOST_KEPT, Routing

pytestmark = pytest.mark.skipif(packed_gemm.library() is None, reason="no compiler")
N_IN, N_OUT = 48, 40
FIRST, COUNT = torch.tensor([0, 2, 2, 0, 0]), torch.tensor([2, 1, 1, 0, 2])


def _numbers(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (5, in), W (out, in), A (3, padded in), B (3, padded out)."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, N_IN, generator=g), torch.randn(N_OUT, N_IN, generator=g)
    A, B = (torch.randn(3, packed_gemm.padded(n), generator=g) for n in (N_IN, N_OUT))
    return x.to(dtype), weight.to(dtype), A.to(dtype), B.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_packed_weights_the_tracer_sees_a_product_with_deltas(dtype: torch.dtype) -> None:
    assert serves("cpu", dtype)
    x, weight, A, B = _numbers(dtype)

    def alone(x: Tensor, A: Tensor, B: Tensor, first: Tensor, count: Tensor) -> Tensor:
        return FrozenLinear(weight).add_deltas(x, RowDeltas(A, B, first, count, len(A)))[0]

    given = x, A, B, FIRST, COUNT
    with torch.no_grad(), dispatched():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            graph = make_fx(alone)(*(mode.from_tensor(x) for x in given))
        join_products(graph.graph)
        graph.recompile()
        found = graph(*given)
    with torch.no_grad():
        assert torch.equal(found, alone(*given))
    mine = (torch.arange(3) >= FIRST[:, None]) & (torch.arange(3) < (FIRST + COUNT)[:, None])
    z = (x.double() @ A[:, :N_IN].double().t()) * mine
    exact = x.double() @ weight.double().t() + z @ B[:, :N_OUT].double()
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def test_gradients_pack_no_copy_that_has_no_room() -> None:
    weight = torch.randn(N_OUT, N_IN).bfloat16()
    assert [FrozenLinear(weight, copies=n).turned.copies for n in (0, 1, 2)] == [0, 0, 1]


def test_a_routing_keeps_the_ranks_of_few_lengths() -> None:
    routing = Routing(2, ())
    for n in range(1, 3 * MOST_KEPT):
        first, count = routing.rows((), 2 * n)
        assert len(first) == len(count) == 2 * n
    assert len(routing._rows) <= MOST_KEPT


def test_deltas_of_other_rows_or_of_another_dtype_are_refused() -> None:
    x, weight, A, B = _numbers(torch.float32)
    layer = FrozenLinear(weight)
    with torch.no_grad(), pytest.raises(ValueError, match="deltas of 5 rows, but x has 10"):
        layer.add_deltas(x.repeat(2, 1), RowDeltas(A, B, FIRST, COUNT, 2))
    with torch.no_grad(), pytest.raises(ValueError, match="bfloat16"):
        layer.add_deltas(x, RowDeltas(A.bfloat16(), B.bfloat16(), FIRST, COUNT, 2))
    with pytest.raises(ValueError, match="bfloat16"):
        packed_gemm.add_deltas(x, RowDeltas(A, B, FIRST, COUNT, 2), torch.zeros(5, N_OUT, dtype=torch.bfloat16))
