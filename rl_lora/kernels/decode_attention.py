"""Attention of a decode step's new tokens in C++ (`decode_attention.cpp`), in float32 or bfloat16 on a CPU.

torch takes a dozen operations that pass matrices of a few rows to one another; here a head of a row is one piece of
work without padding, and reads keys and values where they lie.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_lora.kernels import native_code
from rl_lora.kernels.attention_options import AttentionOptions
from rl_lora.kernels.native_code import OPERATIONS, dense, is_dispatched
from rl_lora.kernels.verify import FastPath, require_all_close

SOURCE = Path(__file__).with_suffix(".cpp")
WIDEST = 256
"""Largest width of heads that it is compiled for."""
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""The dtypes that query, keys, values and output may have, and what storing an output of 1 in them may add to the error
of float32 sums."""


@functools.cache
def library(width: int) -> ctypes.CDLL | None:
    """The compiled code for heads of this width; None where it cannot be compiled, or computes something else."""
    found = native_code.load(SOURCE, f"-DWIDTH={width}") if width <= WIDEST else None
    if found is not None:
        found.attend_all.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_double] * 2, ctypes.c_int]
        found.attend_all.restype = None
    path = FastPath("attention of decode steps is left to torch")
    return found if found is not None and path.verify(lambda: _compare_all(found, width)) else None


def supports(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether `decode_attention` may be called with these: on a CPU, no gradients, heads of one width, all of them
    float32 or all of them bfloat16."""
    if torch.is_grad_enabled():
        return False
    _, H, _, D = query.shape
    if query.dtype not in ROUNDING:
        return False
    for x in (query, *keys, *values):
        if x.dtype != query.dtype or x.device.type != "cpu" or x.shape[3] != D:
            return False
    if any(x.shape[1] != keys[0].shape[1] for x in (*keys, *values)) or H % keys[0].shape[1]:
        return False
    return library(D) is not None


def decode_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    nodes: Sequence[Tensor],
    lengths: Sequence[Tensor],
    at: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Attention (R, H, n, D) of n new tokens of every row to all sources of keys, one behind the other.

    query: (R, H, n, D); keys, values: of each source, (nodes, H_kv, tokens, D); nodes, lengths: int64 (R,) of each
    but the last, which node a row reads and how many tokens of it; at: int64 (R, n), the place of each new token in the
    last source, where row i reads node i, up to that token.
    """
    run = torch.ops.rl_lora.decode_attention if is_dispatched() else _attend
    return run(query, keys, values, nodes, lengths, at, options.scaling, options.window, options.softcap, options.sinks)


def _attend(query: Tensor, *rest: Any) -> Tensor:
    found = library(query.shape[-1])
    assert found is not None
    return _call(found, query, *rest)


def _call(
    found: ctypes.CDLL,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    nodes: Sequence[Tensor],
    lengths: Sequence[Tensor],
    at: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    R, H, n, D = query.shape
    is_bfloat16 = query.dtype == torch.bfloat16
    query, keys, values = dense(query), [dense(x) for x in keys], [dense(x) for x in values]
    at, nodes, lengths = at.contiguous(), [x.contiguous() for x in nodes], [x.contiguous() for x in lengths]
    out = query.new_empty(R, n, H, D)
    if sinks is not None:
        sinks = sinks.float().expand(R, H).contiguous()
    call = array("q", [query.data_ptr(), *query.stride()[:3], out.data_ptr(), at.data_ptr()])
    call.extend([R, H, keys[0].shape[1], n, window or 0])
    call.extend([0, 0] if sinks is None else [sinks.data_ptr(), H])
    sources = array("q")
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        sources.extend([key.data_ptr(), value.data_ptr(), *key.stride()[:3], *value.stride()[:3]])
        sources.extend([nodes[i].data_ptr(), lengths[i].data_ptr()] if i < len(nodes) else [0, 0])
    found.attend_all(call.buffer_info()[0], sources.buffer_info()[0], len(keys), scaling, softcap or 0.0, is_bfloat16)
    return out.transpose(1, 2)


OPERATIONS.define(
    "decode_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor[] nodes, Tensor[] lengths, Tensor at, "
    "float scaling, int? window, float? softcap, Tensor? sinks) -> Tensor"
)
OPERATIONS.impl("decode_attention", _attend, "CPU")
torch.library.register_fake(
    "rl_lora::decode_attention",
    lambda query, *_: query.new_empty(query.shape[0], *query.shape[2:0:-1], query.shape[3]).transpose(1, 2),
    lib=OPERATIONS,
)


def _compare_all(found: ctypes.CDLL, D: int) -> None:
    for dtype in ROUNDING:
        _compare(found, D, dtype)


def _compare(found: ctypes.CDLL, D: int, dtype: torch.dtype) -> None:
    """With float64, of the same inputs: two sources and a row's own, all that a model may ask for."""
    g = torch.Generator().manual_seed(0)
    R, H, n = 3, 14, 2
    sizes = (2, 5), (3, 19), (R, 40)  # nodes, tokens
    keys, values = (
        [torch.randn(count, 2, length, D, generator=g).to(dtype) for count, length in sizes] for _ in range(2)
    )
    nodes, lengths = (
        [torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])],
        [torch.tensor([5, 0, 3]), torch.tensor([0, 9, 19])],
    )
    at = torch.tensor([[0, 1], [36, 37], [4, 5]])
    query = torch.randn(R, n, H, D, generator=g).to(dtype).transpose(1, 2)
    sinks = torch.randn(R, H, generator=g)
    tolerance = 1e-5 * (D / 64) ** 0.5 + 1e-5
    for window, softcap, of_heads in ((None, None, None), (4, 2.0, sinks)):
        out = _call(found, query, keys, values, nodes, lengths, at, 0.3, window, softcap, of_heads)
        for row in range(R):
            k, v = (
                torch.cat(
                    [*(x[i[row], :, : m[row]] for x, i, m in zip(xs, nodes, lengths, strict=False)), xs[-1][row]], 1
                )
                for xs in (keys, values)
            )
            options = AttentionOptions(0.3, window, softcap, None if of_heads is None else of_heads[row])
            for token in range(n):
                seen = slice(None, k.shape[1] - sizes[-1][1] + int(at[row, token]) + 1)
                exact = _dense_attention(query[row, :, token], k[:, seen], v[:, seen], options)
                allowed = tolerance + ROUNDING[dtype] * float(exact.abs().max())
                require_all_close(f"in C++ and {dtype} it differs from float64", out[row, :, token], exact, allowed)


def _dense_attention(query: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """float64 (H, D). query: (H, D); k, v: (H_kv, tokens, D), which end with the query's own token."""
    k, v = (x[:, -(options.window or 0) :].double().repeat_interleave(len(query) // len(x), 0) for x in (k, v))
    scores = options.scaling * (k @ query[:, :, None].double())[..., 0]  # (H, keys)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks[:, None].double()], -1)
    p = torch.softmax(scores, -1)[:, : k.shape[1]]
    return (p[:, None] @ v)[:, 0]
