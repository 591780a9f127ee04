"""Products with weights that never change, packed once for the CPU's matrix library.

A library rearranges a weight before it multiplies, which takes a fifth of the time for the few rows of a decoding step.
torch has operators that do so beforehand, made for its compiler's frozen models; they are not public, so they have to
compute the right product before they are used at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lora.memory import free_bytes

ROWS = 128
"""Rows that weights are packed for. Others can be multiplied as well; up to `MOST_ROWS` it is worth it."""
MOST_ROWS = 512
SHARE = 0.25
"""Of the free memory that packed copies may take."""

Pack = Callable[[Tensor], Tensor]
Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x (N, in), packed, weight (out, in), bias (out,) -> (N, out)."""


class FrozenLinear:
    """x W^T + b for a weight (out, in) that is not trained. Where gradients are asked for, torch's own product.

    Args:
        may_pack: there is memory for a second copy of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = False):
        self.weight, self.bias, self.may_pack = weight, bias, may_pack
        self._packed: Tensor | None = None
        self._version = -1

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        if self.may_pack and not torch.is_grad_enabled() and 1 < x.shape[0] <= MOST_ROWS:
            if (operators := _operators(self.weight.dtype)) is not None:
                pack, multiply = operators
                if self._packed is None or self._version != self.weight._version:
                    self._packed, self._version = pack(self.weight), self.weight._version
                multiply = torch.ops.rl_lora.frozen_linear if _followed else multiply
                return multiply(x, self._packed, self.weight, self.bias)
            self.may_pack = False
        return F.linear(x, self.weight, self.bias)


_followed = False


@contextmanager
def followed() -> Iterator[None]:
    """Inside, packed products are an operation of their own, `rl_lora::frozen_linear`: torch's compiler knows the
    library's as made by itself only, and a tracer that knows sizes as symbols cannot pass them on."""
    global _followed
    before, _followed = _followed, True
    try:
        yield
    finally:
        _followed = before


def _frozen_linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    operators = _operators(weight.dtype)
    assert operators is not None
    return operators[1](x, packed, weight, bias)


OPERATIONS = torch.library.Library("rl_lora", "DEF")
OPERATIONS.define("frozen_linear(Tensor x, Tensor packed, Tensor weight, Tensor? bias) -> Tensor")
for key in ("CPU", "MkldnnCPU"):  # packed weights are of the second kind
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
def _operators(dtype: torch.dtype) -> tuple[Pack, Multiply] | None:
    """How weights of this dtype are packed and multiplied, if that computes what it should on this machine."""
    try:
        pack, multiply = {torch.float32: _mkl, torch.bfloat16: _onednn}[dtype]()
        return (pack, multiply) if _right(pack, multiply, dtype) else None
    except (KeyError, AttributeError, RuntimeError):  # no such dtype, operator, or library
        return None


def _mkl() -> tuple[Pack, Multiply]:
    pack, multiply = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkl._mkl_linear
    return (
        lambda weight: pack(weight, ROWS),
        lambda x, packed, weight, bias: multiply(x, packed, weight, bias, len(x)),
    )


def _onednn() -> tuple[Pack, Multiply]:
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    return (
        lambda weight: pack(weight, ROWS),
        lambda x, packed, weight, bias: multiply(x, packed, bias, "none", [], ""),
    )


def _right(pack: Pack, multiply: Multiply, dtype: torch.dtype) -> bool:
    """Compared with float64, for few rows and many, with sizes that are no multiples of anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n_out, n_in in ((192, 576), (203, 37)):
            weight, bias = torch.randn(n_out, n_in, generator=generator), torch.randn(n_out, generator=generator)
            weight, bias = weight.to(dtype), bias.to(dtype)
            packed = pack(weight)
            for n in (2, 67, ROWS, MOST_ROWS):
                x = torch.randn(n, n_in, generator=generator).to(dtype)
                exact = F.linear(x.double(), weight.double(), bias.double())
                error = (multiply(x, packed, weight, bias).double() - exact).abs().max()
                if not error <= 16 * torch.finfo(dtype).eps * exact.abs().max():
                    return False
    return True
