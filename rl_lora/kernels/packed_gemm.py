"""Products of few rows with a weight that never changes, in C++ (`packed_gemm.cpp`), for decoding on a CPU.

A decode step waits for weights to come from memory. Here they are read in the order in which they lie, and in half
the bytes where bfloat16 holds them exactly, as it does those of most models; sums are in float32 all the same.
GCC, and AVX2 or AVX-512, are needed. `frozen_linear.py` verifies the products.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from rl_lora.kernels import native_code

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled."""
    found = native_code.load(SOURCE)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for function in (found.multiply_float32, found.multiply_bfloat16):
            function.argtypes = [pointer] * 4 + [integer] * 4
            function.restype = None
    return found


def pack_weight(weight: Tensor) -> Tensor:
    """float32 (out, in) -> (panels, in, width): an input's weights for `width` outputs side by side; in bfloat16 where
    that holds all of them exactly, and then outputs j and j + width / 2 are neighbours."""
    found = library()
    assert found is not None
    lanes: int = found.lanes()
    n_out, n_in = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -n_out % (2 * lanes)))
    panels = padded.view(-1, 2, lanes, n_in)
    half = panels.to(torch.bfloat16)
    if torch.equal(half.float(), panels):
        return half.permute(0, 3, 2, 1).reshape(-1, n_in, 2 * lanes).contiguous()
    return panels.permute(0, 3, 1, 2).reshape(-1, n_in, 2 * lanes).contiguous()


def multiply(x: Tensor, packed: Tensor, n_out: int, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b. x: float32 (N, in); n_out: rows of W; out: (N, out), rows of which may be further apart."""
    found = library()
    assert found is not None
    panels, n_in, width = packed.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1:] != (n_in,):
        raise ValueError(f"expected float32 (N, {n_in}) on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    x = x.contiguous()
    whole = panels * width == n_out
    if bias is not None:
        bias = torch.nn.functional.pad(bias.to(x), (0, panels * width - n_out)).contiguous()
    direct = out is not None and whole and out.dtype == x.dtype and out.shape == (len(x), n_out) and out.stride(1) == 1
    to = out if out is not None and direct else x.new_empty(len(x), panels * width)
    run = found.multiply_bfloat16 if packed.dtype == torch.bfloat16 else found.multiply_float32
    run(
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        to.data_ptr(),
        to.stride(0),
        len(x),
        panels,
        n_in,
    )
    if to is out:
        return to
    result = to if whole else to[:, :n_out]
    return result.contiguous() if out is None else out.copy_(result)
