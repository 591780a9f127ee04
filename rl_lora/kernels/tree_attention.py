"""Attention on a tree of spans, and its gradients, in C++ (`tree_attention.cpp`), in float32 on a CPU.

torch takes a dozen passes over padded copies of queries, keys and scores; here only the products that the mask leaves
are computed, where queries and keys lie, and scores stay in the CPU's cache.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function

from rl_lora.kernels import native_code
from rl_lora.kernels.attention_options import AttentionOptions
from rl_lora.kernels.native_code import dense
from rl_lora.kernels.verify import FastPath, require_all_close

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "rl_lora::tree_attention"
"""Its name in a profile."""
WIDTHS = 16
"""The widths of heads are multiples of it."""


class Spans(NamedTuple):
    """A tree of n spans, in the order of a walk through it, over N tokens."""

    table: Tensor
    """int64 (n, 3): first token, number of tokens, the parent's index or -1."""
    end: Tensor
    """int64 (N,): for every token, where the descendants of its span end."""
    positions: Tensor
    """int64 (N,)"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled, or computes something else."""
    found = native_code.load(SOURCE)
    if found is not None:
        pointer, real = ctypes.c_void_p, ctypes.c_double
        found.attend_forward.argtypes, found.attend_forward.restype = [pointer, real, real], None
        found.attend_backward.argtypes, found.attend_backward.restype = [pointer, pointer, real, real], None
    path = FastPath("attention of packed sequences is left to torch")
    return found if found is not None and path.verify(lambda: _compare(found)) else None


def tree_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions) -> Tensor:
    """query: (1, H, N, D); key: (1, H_kv, N, D); value: (1, H_kv, N, D_v). Returns (1, H, N, D_v)."""
    found = library()
    assert found is not None
    return _TreeAttention.apply(query, key, value, spans, options, found)


class _TreeAttention(torch.autograd.Function):
    """Keeps queries, keys, values, and two numbers of every query's softmax."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions, found: ctypes.CDLL
    ) -> Tensor:
        query, key, value = (dense(x) for x in (query, key, value))
        _, H, N, _ = query.shape
        out, softmax = query.new_empty(1, N, H, value.shape[3]), query.new_empty(N, H, 2)
        call = _Call(spans, query, key, value, options, out, softmax)
        with record_function(NAME):
            found.attend_forward(call.address, options.scaling, options.softcap or 0.0)
        ctx.save_for_backward(query, key, value, softmax)
        ctx.spans, ctx.options, ctx.found = spans, options, found
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, softmax = ctx.saved_tensors
        grad, (_, H, N, D), (_, H_kv, _, D_v) = dense(grad), query.shape, value.shape
        threads = torch.get_num_threads()
        parts = parts_of(threads, H_kv)
        dquery = query.new_empty(1, N, H, D)
        dkey, dvalue = query.new_zeros(parts, N, H_kv, D), query.new_zeros(parts, N, H_kv, D_v)
        call = _Call(ctx.spans, query, key, value, ctx.options, None, softmax)
        to = array("q", [*_matrices(grad), *(x.data_ptr() for x in (dquery, dkey, dvalue)), parts])
        with record_function(NAME):
            found, options = ctx.found, ctx.options
            found.attend_backward(call.address, to.buffer_info()[0], options.scaling, options.softcap or 0.0)
        dk, dv = (x if parts == 1 else x.sum(0, keepdim=True) for x in (dkey, dvalue))
        return dquery.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None


def parts_of(threads: int, key_heads: int) -> int:
    """Parts that queries are split into, so that threads share out parts x heads of keys: the fewest, as each has
    gradients of keys of its own, that keep threads busy for nine tenths of the time."""
    return next(n for n in range(1, threads + 1) if 1.1 * n * key_heads >= threads * -(-n * key_heads // threads))


class _Call:
    """The arguments of the C++ (`Call` there), and the tensors that they point at."""

    def __init__(
        self,
        spans: Spans,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        out: Tensor | None,
        softmax: Tensor,
    ):
        table, end, positions = spans.table, spans.end, spans.positions.contiguous()
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        self._alive = (query, key, value, out, softmax, table, end, positions, sinks)
        window = min(options.window or 0, len(end))
        fields = [*_matrices(query), *_matrices(key), *_matrices(value)]
        fields += [table.data_ptr(), len(table), end.data_ptr(), positions.data_ptr()]
        fields += [query.shape[2], query.shape[1], key.shape[1], query.shape[3], value.shape[3], window]
        fields += [0 if x is None else x.data_ptr() for x in (sinks, out, softmax)]
        self._fields = array("q", fields)
        self.address = self._fields.buffer_info()[0]


def _matrices(x: Tensor) -> Sequence[int]:
    """(1, h, N, D) as `Matrices` in the C++."""
    return x.data_ptr(), x.stride(1), x.stride(2)


def _compare(found: ctypes.CDLL) -> None:
    """With a dense mask in float64, gradients too, on a tree of everything that a model may ask for."""
    g = torch.Generator().manual_seed(0)
    spans = _example()
    N, H, H_kv, position = len(spans.end), 6, 2, spans.positions
    q, k, grad = (torch.randn(1, N, h, 48, generator=g).transpose(1, 2) for h in (H, H_kv, H))
    v, sinks = torch.randn(1, N, H_kv, 48, generator=g).transpose(1, 2), torch.randn(H, generator=g)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    for options in (AttentionOptions(0.3), AttentionOptions(0.3, 7, 2.0, sinks)):
        seen = (j <= i) & (i < spans.end) & (position[:, None] - position < (options.window or N))
        results = []
        # Hooks that count or drop what a pass keeps for its backward pass are not meant for this comparison.
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            for dtype in (torch.float32, torch.float64):
                given = query, key, value = tuple(x.to(dtype, copy=True).requires_grad_() for x in (q, k, v))
                if dtype == torch.float64:
                    out = _dense_attention(query, key, value, seen, options)
                else:
                    out = _TreeAttention.apply(query, key, value, spans, options, found)
                results.append([out, *torch.autograd.grad(out, given, grad.to(dtype))])
        for what, ours, exact in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            tolerance = 1e-5 * (1 + float(exact.detach().abs().max()))
            require_all_close(
                f"in C++ its {what} differs from that in float64", ours.detach(), exact.detach(), tolerance
            )


def _example() -> Spans:
    table = [(0, 5, -1), (5, 9, 0), (14, 17, 1), (31, 1, 1), (32, 20, 0), (52, 23, -1)]
    ends, first = (52, 32, 31, 32, 52, 75), (0, 5, 14, 14, 5, 0)
    lengths = torch.tensor([length for _, length, _ in table])
    positions = torch.cat([start + torch.arange(length) for start, (_, length, _) in zip(first, table, strict=True)])
    return Spans(torch.tensor(table), torch.tensor(ends).repeat_interleave(lengths), positions)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: AttentionOptions) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = options.scaling * q @ k.transpose(2, 3)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[..., : k.shape[2]] @ v
