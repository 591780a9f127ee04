"""A linear layer with adapters on it as one operation, and its gradients: on a CPU, in float32 and bfloat16.

    y = x W^T + b + z B,   z = x A^T            u = g B^T,   dx = g W + u A,   dA = sum u x,   dB = sum z g

Each row has the ranks of its own adapter (`RowDeltas`). The sums are in float32: A and B are, whatever x is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl_lora.kernels import packed_gemm
from rl_lora.kernels.frozen_linear import FrozenLinear
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.kernels.verify import FastPath, require_all_close


class Ranks(NamedTuple):
    """Where an adapter's A and B lie among those of a batch, and its scale."""

    start: int
    stop: int
    scale: float


@functools.cache
def serves(device: str, dtype: torch.dtype) -> bool:
    """Whether the deltas of this module are those that they should be."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or packed_gemm.library() is None:
        return False
    return FastPath("deltas of adapters are left to torch").verify(lambda: _compare(dtype))


def adapted_linear(
    x: Tensor, product: FrozenLinear, deltas: RowDeltas, ranks: Sequence[Ranks], factors: Sequence[Tensor]
) -> Tensor:
    """(N, in) -> (N, out). factors: float32 A (r, in) and B (out, r) of each adapter, from which `deltas` were made."""
    if torch.is_grad_enabled():
        return _AdaptedLinear.apply(x, product, deltas, ranks, *factors)
    return product.add_deltas(x, deltas)[0]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: FrozenLinear, deltas: RowDeltas, ranks: Sequence[Ranks], *_: Tensor
    ) -> Tensor:
        y, z = product.add_deltas(x, deltas)
        ctx.save_for_backward(x, z)
        ctx.product, ctx.deltas, ctx.ranks = product, deltas, ranks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, z = ctx.saved_tensors
        grad, turned = grad.contiguous(), ctx.deltas.turned()
        if ctx.needs_input_grad[0]:
            dx, u = ctx.product.turned.add_deltas(grad, turned)
        else:
            dx, u = None, packed_gemm.add_deltas(grad, turned, None)
        dA = packed_gemm.sums_of_outer(u, x, ctx.deltas)
        dB = packed_gemm.sums_of_outer(z, grad, ctx.deltas)
        of_factors: list[Tensor] = []
        for start, stop, scale in ctx.ranks:
            of_factors += [dA[start:stop], (scale * dB[start:stop]).t()]
        return dx, None, None, None, *of_factors


def frozen_linear(x: Tensor, product: FrozenLinear) -> Tensor:
    """(N, in) -> (N, out) without adapters, through which gradients go too."""
    return _Frozen.apply(x, product) if torch.is_grad_enabled() else product(x)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: FrozenLinear) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.product.turned(grad.contiguous()), None


def _compare(dtype: torch.dtype) -> None:
    """With float64: rows of adapters of several ranks, and rows of none."""
    g = torch.Generator().manual_seed(0)
    first, count = torch.tensor([0, 0, 5, 0, 5, 6, 6]), torch.tensor([5, 5, 1, 0, 1, 7, 7])
    mine = (torch.arange(13) >= first[:, None]) & (torch.arange(13) < (first + count)[:, None])
    for n_in, n_out in ((192, 67), (75, 130)):
        A, B = (torch.randn(13, packed_gemm.padded(n), generator=g).to(dtype) for n in (n_in, n_out))
        x, y = (torch.randn(7, n, generator=g).to(dtype) for n in (n_in, n_out))
        deltas = RowDeltas(A, B, first, count, 7)
        z = (x.double() @ A[:, :n_in].double().t()) * mine
        added = z @ B[:, :n_out].double()
        y_exact, weight = y.double() + added, torch.randn(n_out, n_in, generator=g).to(dtype)
        product = packed_gemm.Product(packed_gemm.pack_weight(weight), n_out, y[0], deltas)
        in_one, _ = packed_gemm.multiply(x, product)
        in_one_exact = x.double() @ weight.double().t() + y[0].double() + added
        found = packed_gemm.add_deltas(x, deltas, y)
        outer = packed_gemm.sums_of_outer(found, x, deltas)
        wide = torch.zeros_like(z)
        for row, (start, n) in enumerate(zip(first.tolist(), count.tolist(), strict=True)):
            wide[row, start : start + n] = found[row, :n]
        small = 1e-5, max(1e-5, torch.finfo(dtype).eps)
        for what, ours, exact, tolerance in (
            ("x A^T", wide, z, small[0]),
            ("a sum with deltas", y, y_exact, small[1]),
            ("a product with deltas", in_one, in_one_exact, small[1]),
            ("a sum of outer products", outer, wide.double().t() @ x.double(), small[0]),
        ):
            limit = tolerance * float(exact.abs().max())
            require_all_close(f"in C++ {what} differs from that in float64", ours, exact, limit)
