"""Products with a weight that never changes, and the deltas of adapters, in C++ on a CPU (`packed_gemm.cpp`).

Weights are read in the order in which they lie. Those of float32 take half the bytes where bfloat16 holds them exactly,
as it does those of most models; bfloat16 is multiplied in pairs, by the instruction for that where there is one. Sums
are in float32 all the same. GCC, and AVX2 or AVX-512, are needed. `frozen_linear.py` verifies the products.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from pathlib import Path

import torch
from torch import Tensor

from rl_lora.kernels import native_code
from rl_lora.kernels.row_deltas import RowDeltas

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled."""
    found = native_code.load(SOURCE)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name in ("multiply_float32", "multiply_float32_halved", "multiply_bfloat16"):
            function = getattr(found, name)
            function.argtypes, function.restype = [pointer], None
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


def multiply(
    x: Tensor,
    packed: Tensor,
    n_out: int,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    deltas: RowDeltas | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x W^T + b, with the deltas of adapters where they are given; and z of those.

    x: (N, in), of the weight's dtype; n_out: rows of W; out: (N, out) of that dtype or float32, rows of which may be
    further apart.
    """
    found = library()
    assert found is not None
    in_pairs = packed.dim() == 4
    panels, n_in, width = len(packed), packed.shape[1] * (2 if in_pairs else 1), packed.shape[2]
    dtype = torch.bfloat16 if in_pairs else torch.float32
    if in_pairs and x.shape[1] == n_in - 1:
        x = torch.nn.functional.pad(x, (0, 1))
    if x.dtype != dtype or x.device.type != "cpu" or x.shape[1:] != (n_in,):
        raise ValueError(f"expected {dtype} (N, {n_in}) on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    x, whole = x.contiguous(), panels * width == n_out
    if bias is not None:
        bias = torch.nn.functional.pad(bias.float(), (0, panels * width - n_out)).contiguous()
    direct = whole and out is not None and out.dtype in (dtype, torch.float32) and out.stride(1) == 1
    to = out if direct and out is not None else x.new_empty(len(x), panels * width)
    if deltas is None:
        z, of_deltas = None, None
    else:
        z = x.new_empty(len(x), deltas.most, dtype=torch.float32)
        of_deltas = deltas.call(z)
    call = array("q", [x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), to.data_ptr()])
    call.extend([to.stride(0), to.dtype == torch.float32, len(x), panels, n_in])
    call.append(0 if of_deltas is None else of_deltas.buffer_info()[0])
    if in_pairs:
        found.multiply_bfloat16(call.buffer_info()[0])
    elif packed.dtype == torch.bfloat16:
        found.multiply_float32_halved(call.buffer_info()[0])
    else:
        found.multiply_float32(call.buffer_info()[0])
    if to is out:
        return to, z
    result = to if whole else to[:, :n_out]
    return (result.contiguous() if out is None else out.copy_(result)), z


def add_deltas(x: Tensor, deltas: RowDeltas, y: Tensor | None) -> Tensor:
    """y += z B, in place; returns z, float32 (N, most). x: (N, in); y: (N, out), contiguous, or None for z alone."""
    found = library()
    assert found is not None
    x = x.contiguous()
    z = x.new_empty(len(x), deltas.most, dtype=torch.float32)
    call, run = deltas.call(z), found.add_deltas_bfloat16 if x.dtype == torch.bfloat16 else found.add_deltas_float32
    to, n_out = (0, 0) if y is None else (y.data_ptr(), y.shape[1])
    run(call.buffer_info()[0], x.data_ptr(), x.shape[1], to, n_out, len(x))
    return z


def sums_of_outer(z: Tensor, x: Tensor, deltas: RowDeltas) -> Tensor:
    """float32 (K, n): sums over the rows of z (N, >= most) times x (N, n), those of a row for its own ranks."""
    found = library()
    assert found is not None
    x, n = x.contiguous(), x.shape[1]
    out = z.new_zeros(len(deltas.A), padded(n))
    call, run = deltas.call(z), found.outer_bfloat16 if x.dtype == torch.bfloat16 else found.outer_float32
    run(call.buffer_info()[0], x.data_ptr(), n, len(x), out.data_ptr(), out.stride(0))
    return out[:, :n]
