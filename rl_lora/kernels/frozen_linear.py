"""Products with weights that never change, rearranged once for reading on a CPU.

In float32 they are computed by `packed_gemm.py` where it can be compiled, else by the CPU's matrix library. The library
rearranges a weight before it multiplies, a fifth of the time for the few rows of a decode step; torch has operators
that do so beforehand, made for its compiler's frozen models, and not public. Either is used once it has been verified.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lora.kernels import packed_gemm
from rl_lora.kernels.native_code import OPERATIONS, is_dispatched
from rl_lora.kernels.verify import FastPath, require_all_close
from rl_lora.system.memory import free_bytes

ROWS = 128
"""Rows that the library packs weights for. Other numbers can be multiplied as well; up to `MOST_ROWS` it pays."""
MOST_ROWS = 512
SHARE = 0.25
"""Share of the free memory that packed copies may take."""


class Operators(NamedTuple):
    """How weights of a dtype are packed and multiplied."""

    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    """x (N, in), packed, weight (out, in), bias (out,), tensor to write to or None -> (N, out)."""
    least_rows: int
    """The fewest rows with which it is faster than torch's own product."""


class FrozenLinear:
    """x W^T + b for a weight (out, in) that is not trained. Where gradients are asked for, torch's own product.

    A weight that is written to is packed anew; a write through its `.data` is not noticed.

    Args:
        may_pack: there is memory for a second copy of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = False):
        self.weight, self.bias, self.may_pack = weight, bias, may_pack
        self.packed: Tensor | None = None
        """The packed weight, after the first product."""
        self._version = -1

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out), in `out` where that is given: it may be of another dtype."""
        if self.may_pack and not torch.is_grad_enabled() and 0 < x.shape[0] <= MOST_ROWS:
            operators = _operators(self.weight.dtype)
            if operators is None or not self.weight.numel() or self.weight.device.type != "cpu":
                self.may_pack = False
            elif x.shape[0] >= operators.least_rows:
                if self.packed is None or self._version != self.weight._version:
                    self.packed, self._version = operators.pack(self.weight), self.weight._version
                if not is_dispatched():
                    return operators.multiply(x, self.packed, self.weight, self.bias, out)
                result = torch.ops.rl_lora.frozen_linear(x, self.packed, self.weight, self.bias)
                return _written(result, out)
        return _written(F.linear(x, self.weight, self.bias), out)


def _frozen_linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    operators = _operators(weight.dtype)
    assert operators is not None
    return operators.multiply(x, packed, weight, bias, None)


# torch's compiler knows the library's operators as made by itself only, and passes no symbolic sizes on to them.
OPERATIONS.define("frozen_linear(Tensor x, Tensor packed, Tensor weight, Tensor? bias) -> Tensor")
for key in ("CPU", "MkldnnCPU"):  # what oneDNN has packed is of the second kind
    OPERATIONS.impl("frozen_linear", _frozen_linear, key)
torch.library.register_fake(
    "rl_lora::frozen_linear", lambda x, _, weight, __: x.new_empty(x.shape[0], weight.shape[0]), lib=OPERATIONS
)


def may_pack(model: nn.Module) -> bool:
    """Whether this is a CPU, with memory for a second copy of all linear layers."""
    weights = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    if any(weight.device.type != "cpu" for weight in weights):
        return False
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    return needed <= SHARE * free_bytes(torch.device("cpu"))


@functools.cache
def _operators(dtype: torch.dtype) -> Operators | None:
    """The first that computes what it should on this machine."""
    for candidate in {torch.float32: (_ours, _mkl), torch.bfloat16: (_onednn,)}.get(dtype, ()):
        path = FastPath("weights are packed in another way, or not at all", absent=(AttributeError, RuntimeError))
        operators = path.attempt(candidate)
        if operators is not None and path.verify(partial(_compare, operators, dtype)):
            return operators
    return None


def _ours() -> Operators | None:
    if packed_gemm.library() is None:
        return None
    return Operators(
        packed_gemm.pack_weight,
        lambda x, packed, weight, bias, out: packed_gemm.multiply(x, packed, len(weight), bias, out),
        least_rows=1,
    )


def _mkl() -> Operators:
    pack, multiply = torch.ops.mkl._mkl_reorder_linear_weight.default, torch.ops.mkl._mkl_linear.default
    return Operators(
        lambda weight: pack(weight, ROWS),
        lambda x, packed, weight, bias, out: _written(multiply(x, packed, weight, bias, len(x)), out),
        least_rows=2,
    )


def _onednn() -> Operators:
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    return Operators(
        lambda weight: pack(weight, ROWS),
        lambda x, packed, weight, bias, out: _written(multiply(x, packed, bias, "none", [], ""), out),
        least_rows=2,
    )


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _compare(operators: Operators, dtype: torch.dtype) -> None:
    """With float64, for few rows and many, with sizes that are no multiples of anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n_out, n_in, held in ((192, 576, dtype), (203, 1637, torch.bfloat16)):
            weight, bias = torch.randn(n_out, n_in, generator=generator), torch.randn(n_out, generator=generator)
            weight, bias = weight.to(held).to(dtype), bias.to(dtype)
            packed = operators.pack(weight)
            for n in (operators.least_rows, 67, ROWS, MOST_ROWS):
                x = torch.randn(n, n_in, generator=generator).to(dtype)
                exact = F.linear(x.double(), weight.double(), bias.double())
                tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
                product = operators.multiply(x, packed, weight, bias, None)
                require_all_close(f"a product of {n} rows differs from that in float64", product, exact, tolerance)
