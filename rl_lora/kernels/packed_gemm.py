"""Products with a weight that never changes, and the deltas of adapters, in C++ on a CPU (`packed_gemm.cpp`).

Weights are read in the order in which they lie. Those of float32 take half the bytes where bfloat16 holds them exactly,
as it does those of most models; bfloat16 is multiplied in pairs, by the instruction for that where there is one. Sums
are in float32 all the same. GCC, and AVX2 or AVX-512, are needed. `frozen_linear.py` verifies the products.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lora.kernels import native_code
from rl_lora.kernels.row_deltas import RowDeltas

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled."""
    found = native_code.load(SOURCE)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name in ("multiply_float32", "multiply_float32_halved", "multiply_bfloat16"):
            function = getattr(found, name)
            function.argtypes, function.restype = [pointer, integer], None
        for name in ("add_deltas_float32", "add_deltas_bfloat16"):
            function = getattr(found, name)
            function.argtypes, function.restype = [pointer, pointer, integer, pointer, integer, integer], None
        for name in ("outer_float32", "outer_bfloat16"):
            function = getattr(found, name)
            function.argtypes, function.restype = [pointer, pointer, integer, integer, pointer, integer], None
    return found


def padded(n: int) -> int:
    """The numbers of a row of n outputs in whole panels."""
    found = library()
    assert found is not None
    width: int = 2 * found.lanes()
    return n + -n % width


def pack_weight(weight: Tensor) -> Tensor:
    """(out, in) -> (panels, in, width): an input's weights for `width` outputs side by side.

    Those of float32 become bfloat16 where that holds all of them exactly, and then outputs j and j + width / 2 are
    neighbours. Those of bfloat16 become (panels, in / 2, width, 2): two inputs' side by side.
    """
    found = library()
    assert found is not None
    lanes: int = found.lanes()
    n_out, n_in = weight.shape
    if weight.dtype == torch.bfloat16:
        whole = torch.nn.functional.pad(weight, (0, n_in % 2, 0, -n_out % (2 * lanes)))
        return whole.reshape(-1, 2 * lanes, whole.shape[1] // 2, 2).transpose(1, 2).contiguous()
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -n_out % (2 * lanes)))
    panels = whole.reshape(-1, 2, lanes, n_in)
    half = panels.to(torch.bfloat16)
    if torch.equal(half.float(), panels):
        return half.permute(0, 3, 2, 1).reshape(-1, n_in, 2 * lanes).contiguous()
    return panels.permute(0, 3, 1, 2).reshape(-1, n_in, 2 * lanes).contiguous()


class Product(NamedTuple):
    """One of several products of the same rows."""

    packed: Tensor
    n_out: int
    """Rows of W."""
    bias: Tensor | None = None
    deltas: RowDeltas | None = None


def multiply(x: Tensor, product: Product, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x W^T + b, with the deltas of adapters where they are given; and z of those.

    x: (N, in), of the weight's dtype; out: (N, out) of that dtype or float32, rows of which may be further apart.
    """
    panels, _, width = product.packed.shape[:3]
    if out is None or (
        panels * width == product.n_out and out.dtype in (x.dtype, torch.float32) and out.stride(1) == 1
    ):
        return multiply_all(x, [product], out)[0]
    whole = None if out.dtype == x.dtype else x.new_empty(len(x), panels * width, dtype=FLOAT32)  # rounded once
    y, z = multiply_all(x, [product], whole)[0]
    return out.copy_(y), z


def multiply_all(
    x: Tensor, products: Sequence[Product], out: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """Several products of the same rows at once, with weights of one form; `out`: where the only one is written."""
    found = library()
    assert found is not None
    like = products[0].packed
    in_pairs = like.dim() == 4
    n_in, width, dtype = like.shape[1] * (2 if in_pairs else 1), like.shape[2], BFLOAT16 if in_pairs else FLOAT32
    if in_pairs and x.shape[1] == n_in - 1:
        x = torch.nn.functional.pad(x, (0, 1))
    if x.dtype != dtype or x.device.type != "cpu" or x.shape[1:] != (n_in,):
        raise ValueError(f"expected {dtype} (N, {n_in}) on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    x, N = x.contiguous(), x.shape[0]
    calls, results = array("q"), []
    kept: list[Any] = []  # what the calls point at
    for packed, n_out, bias, deltas in products:
        panels = packed.shape[0]
        to = x.new_empty(N, panels * width) if out is None else out
        if bias is not None:
            bias = torch.nn.functional.pad(bias.float(), (0, panels * width - n_out)).contiguous()
        z, of_deltas = None, 0
        if deltas is not None:
            z = x.new_empty(N, deltas.most, dtype=FLOAT32)
            of = deltas.call(x, z)
            kept.append(of)
            of_deltas = of.buffer_info()[0]
        kept.append(bias)
        calls.extend(
            (
                *(x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), to.data_ptr()),
                *(to.stride(0), to.dtype == FLOAT32, N, panels, n_in, of_deltas),
            )
        )
        results.append((to, n_out, z))
    name = "multiply_bfloat16" if in_pairs else f"multiply_float32{'_halved' * (like.dtype == BFLOAT16)}"
    getattr(found, name)(calls.buffer_info()[0], len(products))
    return [(y if y.shape[1] == n_out else y[:, :n_out].contiguous(), z) for y, n_out, z in results]


def add_deltas(x: Tensor, deltas: RowDeltas, y: Tensor | None) -> Tensor:
    """y += z B, in place; returns z, float32 (N, most). x: (N, in); y: (N, out), contiguous, or None for z alone."""
    found = library()
    assert found is not None
    if y is not None and (y.dtype != x.dtype or not y.is_contiguous()):
        raise ValueError(f"expected a contiguous y of {x.dtype}, got {y.dtype} with strides {y.stride()}")
    x = x.contiguous()
    z = x.new_empty(len(x), deltas.most, dtype=torch.float32)
    call, run = deltas.call(x, z), found.add_deltas_bfloat16 if x.dtype == torch.bfloat16 else found.add_deltas_float32
    to, n_out = (0, 0) if y is None else (y.data_ptr(), y.shape[1])
    run(call.buffer_info()[0], x.data_ptr(), x.shape[1], to, n_out, len(x))
    return z


def sums_of_outer(z: Tensor, x: Tensor, deltas: RowDeltas) -> Tensor:
    """float32 (K, n): sums over the rows of z (N, >= most) times x (N, n), those of a row for its own ranks."""
    found = library()
    assert found is not None
    x, n = x.contiguous(), x.shape[1]
    out = z.new_zeros(len(deltas.A), padded(n))
    call, run = deltas.call(x, z), found.outer_bfloat16 if x.dtype == torch.bfloat16 else found.outer_float32
    run(call.buffer_info()[0], x.data_ptr(), n, len(x), out.data_ptr(), out.stride(0))
    return out[:, :n]
