"""Attention on a tree of spans, and its gradients, in C++ (`tree_attention.cpp`), in float32 or bfloat16 on a CPU.

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
from torch.autograd.function import once_differentiable
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
ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat16"}
"""In C++, by the dtype of queries, keys and values."""


class Spans(NamedTuple):
    """A tree of n spans, in the order of a walk through it, over N tokens."""

    table: Tensor
    """int64 (n, 3): first token, number of tokens, the parent's index or -1."""
    end: Tensor
    """int64 (N,): for every token, where the descendants of its span end."""
    positions: Tensor
    """int64 (N,)"""


class Past(NamedTuple):
    """Keys and values of an earlier pass that the roots of a tree continue; they get no gradients."""

    key: Tensor
    """(n, H_kv, L, D)"""
    value: Tensor
    """(n, H_kv, L, D_v)"""
    lengths: Tensor
    """int64 (n,): tokens of each node."""
    node: Tensor
    """int64: the node that each span of the tree continues; of spans with a parent, anything."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled code for a dtype; None where it cannot be compiled, or computes something else."""
    found = native_code.load(SOURCE, f"-DELEMENT={ELEMENTS[dtype]}") if dtype in ELEMENTS else None
    if found is not None:
        pointer, real = ctypes.c_void_p, ctypes.c_double
        found.attend_forward.argtypes, found.attend_forward.restype = [pointer, real, real], None
        found.attend_backward.argtypes, found.attend_backward.restype = [pointer, pointer, real, real], None
    path = FastPath("attention of packed sequences is left to torch")
    return found if found is not None and path.verify(lambda: _compare(found, dtype)) else None


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, options: AttentionOptions, past: Past | None = None
) -> Tensor:
    """query: (1, H, N, D); key: (1, H_kv, N, D); value: (1, H_kv, N, D_v). Returns (1, H, N, D_v)."""
    found = library(query.dtype)
    assert found is not None
    return _TreeAttention.apply(query, key, value, spans, options, past, found)


class _TreeAttention(torch.autograd.Function):
    """Keeps queries, keys, values, and two numbers of every query's softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Spans,
        options: AttentionOptions,
        past: Past | None,
        found: ctypes.CDLL,
    ) -> Tensor:
        query, key, value = (dense(x) for x in (query, key, value))
        _, H, N, _ = query.shape
        out = query.new_empty(1, N, H, value.shape[3])
        softmax = query.new_empty(N, H, 2, dtype=torch.float32)
        call = _Call(spans, query, key, value, options, past, out, softmax)
        with record_function(NAME):
            found.attend_forward(call.address, options.scaling, options.softcap or 0.0)
        ctx.save_for_backward(query, key, value, softmax)
        ctx.spans, ctx.options, ctx.has_past, ctx.found = spans, options, past is not None, found
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.has_past
        query, key, value, softmax = ctx.saved_tensors
        grad, (_, H, N, D), (_, H_kv, _, D_v) = dense(grad), query.shape, value.shape
        parts = parts_of(torch.get_num_threads(), H_kv)
        results = [query.new_empty(1, N, h, d) for h, d in ((H, D), (H_kv, D), (H_kv, D_v))]
        of_parts = [query.new_empty(parts, H_kv, N, d, dtype=torch.float32) for d in (D, D_v)]
        call = _Call(ctx.spans, query, key, value, ctx.options, None, None, softmax)
        to = array("q", [*_matrices(grad), *(x.data_ptr() for x in (*results, *of_parts)), parts])
        with record_function(NAME):
            found, options = ctx.found, ctx.options
            found.attend_backward(call.address, to.buffer_info()[0], options.scaling, options.softcap or 0.0)
        return *(x.transpose(1, 2) for x in results), None, None, None, None


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
        past: Past | None,
        out: Tensor | None,
        softmax: Tensor,
    ):
        table, end, positions = spans.table, spans.end, spans.positions.contiguous()
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        of_past: list[Tensor] = []
        if past is not None:
            of_past = [dense(past.key), dense(past.value), past.node.contiguous(), past.lengths.contiguous()]
        self._alive = (query, key, value, out, softmax, table, end, positions, sinks, of_past)
        window = min(options.window or 0, 2**31 - 1)
        fields = [*_matrices(query), *_matrices(key), *_matrices(value)]
        if past is None:
            fields += [0] * 10
        else:
            fields += [*_matrices(of_past[0]), *_matrices(of_past[1]), of_past[2].data_ptr(), of_past[3].data_ptr()]
        fields += [table.data_ptr(), len(table), end.data_ptr(), positions.data_ptr()]
        fields += [query.shape[2], query.shape[1], key.shape[1], query.shape[3], value.shape[3], window]
        fields += [0 if x is None else x.data_ptr() for x in (sinks, out, softmax)]
        self._fields = array("q", fields)
        self.address = self._fields.buffer_info()[0]


def _matrices(x: Tensor) -> Sequence[int]:
    """(n, h, N, D) as `Matrices` in the C++."""
    return x.data_ptr(), *x.stride()[:3]


def _compare(found: ctypes.CDLL, dtype: torch.dtype) -> None:
    """With a dense mask in float64, on a tree of everything that a model may ask for: gradients too, and what comes out
    behind an earlier pass."""
    g = torch.Generator().manual_seed(0)
    spans, of_root = _example()
    N, H, H_kv, D = len(spans.end), 6, 2, 48
    q, k, v, grad = (torch.randn(1, N, h, D, generator=g).to(dtype).transpose(1, 2) for h in (H, H_kv, H_kv, H))
    lengths, sinks = torch.tensor([9, 21]), torch.randn(H, generator=g)
    past_key, past_value = torch.randn(2, 2, H_kv, 21, D, generator=g).to(dtype)
    past = Past(past_key, past_value, lengths, of_root[spans.table[:, 0]])
    behind = Spans(spans.table, spans.end, spans.positions + lengths[of_root])
    k_all, v_all = (torch.cat([*(x[None] for x in xs), own], 2) for xs, own in ((past.key, k), (past.value, v)))
    i, j = torch.arange(N)[:, None], torch.arange(N)
    node, place = torch.arange(2).repeat_interleave(21), torch.arange(21).repeat(2)
    for options in (AttentionOptions(0.3), AttentionOptions(0.3, 7, 2.0, sinks)):
        window = options.window or 2 * N

        def check(name: str, ours: Tensor, exact: Tensor) -> None:
            tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * (1 + float(exact.detach().abs().max()))
            what = f"in C++ its {name} differs from that in float64"
            require_all_close(what, ours.detach(), exact.detach(), tolerance)

        seen = (j <= i) & (i < spans.end) & (spans.positions[:, None] - spans.positions < window)
        of_past = (of_root[:, None] == node) & (place < lengths[node]) & (behind.positions[:, None] - place < window)
        # Hooks that count or drop what a pass keeps for its backward pass are not meant for this comparison.
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            given, exactly = (
                [x.to(to, copy=True).requires_grad_() for x in (q, k, v)] for to in (dtype, torch.float64)
            )
            out = _TreeAttention.apply(*given, spans, options, None, found)
            exact = _dense_attention(exactly, seen, options)
            ours = torch.autograd.grad(out, given, grad)
            for name, x, y in zip(
                ("output", "dq", "dk", "dv"),
                (out, *ours),
                (exact, *torch.autograd.grad(exact, exactly, grad.double())),
                strict=True,
            ):
                check(name, x, y)
            out = _TreeAttention.apply(q, k, v, behind, options, past, found)
        every = torch.cat([of_past, seen], 1)
        exact = _dense_attention([x.double() for x in (q, k_all, v_all)], every, options)
        check("output behind an earlier pass", out, exact)


def _example() -> tuple[Spans, Tensor]:
    """Two trees, and of each token the tree that it belongs to."""
    table = [(0, 5, -1), (5, 9, 0), (14, 17, 1), (31, 1, 1), (32, 20, 0), (52, 23, -1)]
    ends, first = (52, 32, 31, 32, 52, 75), (0, 5, 14, 14, 5, 0)
    lengths = torch.tensor([length for _, length, _ in table])
    positions = torch.cat([start + torch.arange(length) for start, (_, length, _) in zip(first, table, strict=True)])
    spans = Spans(torch.tensor(table), torch.tensor(ends).repeat_interleave(lengths), positions)
    return spans, (torch.arange(75) >= 52).long()


def _dense_attention(qkv: Sequence[Tensor], seen: Tensor, options: AttentionOptions) -> Tensor:
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = options.scaling * q @ k.transpose(2, 3)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[..., : k.shape[2]] @ v
