"""The elementwise chains of a layer in C++ (`elementwise.cpp`), in float32 and bfloat16 on a CPU, one pass each.

RMSNorm, the rotary embedding of queries and keys, and the gated activation of an MLP. torch takes a pass over memory
for each operation of a chain, rounds after each in bfloat16, and keeps most of what is between them for the backward
pass.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function

from rl_lora.kernels import native_code
from rl_lora.kernels.native_code import OPERATIONS, dense, is_dispatched
from rl_lora.kernels.verify import FastPath, require_all_close

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)
Activation = Literal["silu", "gelu_tanh"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled, or computes something else."""
    found = native_code.load(SOURCE)
    if found is not None:
        declare(found)
    path = FastPath("norms, rotary embeddings and gated activations are left to torch")
    return found if found is not None and path.verify(lambda: compare(found)) else None


def declare(found: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take."""
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    for name, arguments in {
        "rms_norm": [*[pointer] * 4, *[size] * 2, *[flag] * 3, *[real] * 2],
        "rms_norm_backward": [*[pointer] * 5, *[size] * 2, *[flag] * 2, real],
        "rotary": [*[pointer] * 2, *[flag] * 2],
        "gated": [*[pointer] * 3, size, *[flag] * 2],
        "gated_backward": [*[pointer] * 5, size, *[flag] * 2],
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None


def supports(x: Tensor, *others: Tensor) -> bool:
    """Whether chains of these are computed here: on a CPU, all in float32 or all in bfloat16."""
    if x.dtype not in DTYPES or x.device.type != "cpu" or library() is None:
        return False
    return all(other.dtype == x.dtype and other.device.type == "cpu" for other in others)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = False) -> Tensor:
    """x / sqrt(mean x^2 + eps) * (weight + offset), over the last dimension. The weight gets no gradient.

    x: (..., d); weight: (d,), of either dtype. rounds: in bfloat16, what is multiplied by the weight is rounded first.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps, offset, rounds, _found())
    run = torch.ops.rl_lora.rms_norm if is_dispatched() else _rms_norm
    return run(x, weight, eps, offset, rounds)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions: x cos + (-x_2, x_1) sin, where x_1 and x_2 are the halves of a head.

    query: (B, H, L, D); key: (B, H_kv, L, D); cos, sin: (B or 1, L, D), which get no gradient. What is returned lies in
    memory as (B, L, H, D).
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _Rotary.apply(query, key, cos, sin, _found())
    run = torch.ops.rl_lora.rotary if is_dispatched() else _rotary
    return run(query, key, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up; both of one shape."""
    gelu = activation == "gelu_tanh"
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, gelu, _found())
    run = torch.ops.rl_lora.gated if is_dispatched() else _gated
    return run(gate, up, gelu)


def _found() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


class _RMSNorm(torch.autograd.Function):
    """Keeps x, and a number of every row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool, found: ctypes.CDLL
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
        with record_function("rl_lora::rms_norm"):
            out = _call_rms_norm(found, x, weight, scales, eps, offset, rounds)
        ctx.save_for_backward(x, weight, scales)
        ctx.offset, ctx.found = offset, found
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        pointers = (grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scales.data_ptr(), dx.data_ptr())
        with record_function("rl_lora::rms_norm"):
            ctx.found.rms_norm_backward(
                *pointers, scales.numel(), len(weight), _is_bfloat16(x), _is_bfloat16(weight), ctx.offset
            )
        return dx, None, None, None, None, None


class _Rotary(torch.autograd.Function):
    """Keeps cosines and sines."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, found: ctypes.CDLL
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.found = found
        with record_function("rl_lora::rotary"):
            return _call_rotary(found, query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        with record_function("rl_lora::rotary"):
            cos, sin = ctx.saved_tensors
            return *_call_rotary(ctx.found, dquery, dkey, cos, sin, inverse=True), None, None, None


class _Gated(torch.autograd.Function):
    """Keeps what it is given."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool, found: ctypes.CDLL) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gelu, ctx.found = gelu, found
        with record_function("rl_lora::gated"):
            return _call_gated(found, gate, up, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad, dgate, dup = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        pointers = [x.data_ptr() for x in (grad, gate, up, dgate, dup)]
        with record_function("rl_lora::gated"):
            ctx.found.gated_backward(*pointers, gate.numel(), _is_bfloat16(gate), ctx.gelu)
        return dgate, dup, None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
    return _call_rms_norm(_found(), x.contiguous(), weight.contiguous(), None, eps, offset, rounds)


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _call_rotary(_found(), query, key, cos, sin)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _call_gated(_found(), gate.contiguous(), up.contiguous(), gelu)


OPERATIONS.define("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounds) -> Tensor")
OPERATIONS.define("rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
OPERATIONS.define("gated(Tensor gate, Tensor up, bool gelu) -> Tensor")
for _name, _work in (("rms_norm", _rms_norm), ("rotary", _rotary), ("gated", _gated)):
    OPERATIONS.impl(_name, _work, "CPU")
for _name in ("rms_norm", "gated"):
    torch.library.register_fake(f"rl_lora::{_name}", lambda x, *_: x.new_empty(x.shape), lib=OPERATIONS)
torch.library.register_fake(
    "rl_lora::rotary", lambda query, key, *_: (_by_token(query), _by_token(key)), lib=OPERATIONS
)


def _call_rms_norm(
    found: ctypes.CDLL, x: Tensor, weight: Tensor, scales: Tensor | None, eps: float, offset: float, rounds: bool
) -> Tensor:
    """x and weight contiguous; scales: float32, a number a row to keep, or None."""
    out, width = torch.empty_like(x), len(weight)
    pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), None if scales is None else scales.data_ptr())
    rows = x.numel() // max(width, 1)
    found.rms_norm(*pointers, rows, width, _is_bfloat16(x), _is_bfloat16(weight), rounds, offset, eps)
    return out


def _call_rotary(
    found: ctypes.CDLL, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    B, _, L, D = query.shape
    cos, sin = dense(cos).expand(B, L, D), dense(sin).expand(B, L, D)
    given, results = [dense(query), dense(key)], (_by_token(query), _by_token(key))
    call = array("q", [cos.data_ptr(), *cos.stride()[:2], sin.data_ptr(), *sin.stride()[:2], B, L, D, len(given)])
    heads = array("q")
    for x, out in zip(given, results, strict=True):
        heads.extend([x.data_ptr(), *x.stride()[:3], x.shape[1], out.data_ptr()])
    found.rotary(call.buffer_info()[0], heads.buffer_info()[0], _is_bfloat16(query), inverse)
    return results


def _call_gated(found: ctypes.CDLL, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """gate and up contiguous."""
    out = torch.empty_like(gate)
    found.gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), _is_bfloat16(gate), gelu)
    return out


def _by_token(x: Tensor) -> Tensor:
    """An empty tensor (B, H, L, D) that lies in memory as (B, L, H, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _is_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm` by torch, in the dtype of x."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def plain_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` by torch."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    return turned(query), turned(key)


def plain_gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`gated` by torch."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def compare(found: ctypes.CDLL) -> None:
    """With float64, values and gradients, in both dtypes, with sizes that are no multiples of anything.

    Raises:
        Mismatch: one differs by more than rounding.
    """
    g = torch.Generator().manual_seed(0)
    x, up, weight = (
        torch.randn(2, 5, 171, generator=g),
        torch.randn(2, 5, 171, generator=g),
        torch.rand(171, generator=g),
    )
    query, key = (torch.randn(2, 5, heads, 74, generator=g).transpose(1, 2) for heads in (3, 1))
    cos, sin = torch.randn(2, 2, 5, 74, generator=g)
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for dtype in DTYPES:
        for offset, rounds in ((0.0, True), (1.0, False)):
            _compare_chain(
                "RMSNorm",
                lambda *xs, o=offset, r=rounds: _RMSNorm.apply(*xs, 1e-5, o, r, found),
                partial(plain_rms_norm, eps=1e-5, offset=offset),
                [x.to(dtype), weight.to(dtype)],
                n_given=1,
            )
        turned = [t.to(dtype) for t in (query, key, cos, sin)]
        _compare_chain("a rotary embedding", lambda *xs: _Rotary.apply(*xs, found), plain_rotary, turned, n_given=2)
        for activation in activations:
            _compare_chain(
                "a gated activation",
                lambda *xs, gelu=activation == "gelu_tanh": _Gated.apply(*xs, gelu, found),
                partial(plain_gated, activation=activation),
                [4 * x.to(dtype), up.to(dtype)],
                n_given=2,
            )


def _compare_chain(
    name: str, ours: Callable[..., Any], exact: Callable[..., Any], tensors: Sequence[Tensor], n_given: int
) -> None:
    """n_given: how many of the tensors have gradients."""
    dtype, results = tensors[0].dtype, []
    # Hooks that count or drop what a pass keeps for its backward pass are not meant for this comparison.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        for compute, of in ((ours, dtype), (exact, torch.float64)):
            inputs = [x.to(of, copy=True) for x in tensors]
            given = [x.requires_grad_() for x in inputs[:n_given]]
            outputs = compute(*inputs)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            grads = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype).to(of) for x in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, given, grads)])
    for found, expected in zip(*results, strict=True):
        expected = expected.detach()
        tolerance = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * (1 + float(expected.abs().max()))
        require_all_close(f"in C++ {name} differs from that in float64", found.detach(), expected, tolerance)
