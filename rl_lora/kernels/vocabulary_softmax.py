"""The softmax over the vocabulary in C++ (`vocabulary_softmax.cpp`), on a CPU: the draw of a token from a row of
logits, and the log-probability of a given token with its gradient.

torch takes a dozen passes over copies in float32; here a row is read once where it lies, in the dtype that it has, and
written once where there is a gradient.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from rl_lora.kernels import native_code
from rl_lora.kernels.native_code import OPERATIONS, is_dispatched
from rl_lora.kernels.verify import FastPath, require_all_close

SOURCE = Path(__file__).with_suffix(".cpp")
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes of logits, and what the C++ calls them."""
NAME = "rl_lora::token_logprobs"
"""The name of `token_logprobs` in a profile."""


class _Call(ctypes.Structure):
    """The logits, as `Call` in the C++."""

    _fields_ = [
        ("projected", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "rows", "V")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


class _Drawing(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("temperature", "uniforms", "tokens", "logprobs")]


class _Scoring(ctypes.Structure):
    _fields_ = [
        ("targets", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("logprobs", ctypes.c_void_p),
        ("entropies", ctypes.c_void_p),
        ("gradient", ctypes.c_int64),
    ]


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled code, for logits of a dtype; None where it cannot be compiled, or computes something else."""
    found = native_code.load(SOURCE) if dtype in SUFFIXES else None
    if found is not None:
        for name in ("draw", "score"):
            function = getattr(found, f"{name}_{SUFFIXES[dtype]}")
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    path = FastPath("the softmax over the vocabulary is left to torch")
    return found if found is not None and path.verify(lambda: _compare(found, dtype)) else None


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `draw` and `token_logprobs` may be called with logits of this dtype, on this device."""
    return device.type == "cpu" and library(dtype) is not None


def draw(
    projected: Tensor, temperature: Tensor | None, uniforms: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token a row from the softmax of cap(scale * projected) / temperature.

    projected: (R, V), float32 or bfloat16; temperature: (R,), 0 for the most probable token, or None where all are 1;
    uniforms: (R,) in [0, 1). Returns tokens int64 (R,), and their log-probabilities float32 (R,), at temperature 1
    where that is 0.
    """
    run = torch.ops.rl_lora.draw if is_dispatched() else _draw
    return run(projected, temperature, uniforms, scale, softcap)


def token_logprobs(
    projected: Tensor,
    targets: Tensor,
    temperature: float,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy, float32 (N,), of the softmax of cap(scale * projected) / temperature.

    projected: (N, V), float32 or bfloat16; targets: int64 (N,).
    gradient: write d log p(target) / d projected, times temperature / scale, over `projected`.
    Raises IndexError if a target is not a token of the vocabulary.
    """
    found = library(projected.dtype)
    assert found is not None
    return _token_logprobs(found, projected, targets, temperature, scale, softcap, gradient)


def _draw(
    projected: Tensor, temperature: Tensor | None, uniforms: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    found = library(projected.dtype)
    assert found is not None
    return _draw_with(found, projected, temperature, uniforms, scale, softcap)


def _draw_with(
    found: ctypes.CDLL,
    projected: Tensor,
    temperature: Tensor | None,
    uniforms: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    temperature = None if temperature is None else temperature.float().contiguous()
    uniforms = uniforms.float().contiguous()
    tokens = torch.empty(len(projected), dtype=torch.int64)
    logprobs = torch.empty(len(projected), dtype=torch.float32)
    of_temperature = None if temperature is None else temperature.data_ptr()
    drawing = _Drawing(of_temperature, uniforms.data_ptr(), tokens.data_ptr(), logprobs.data_ptr())
    call = _call(projected, scale, softcap)
    getattr(found, f"draw_{SUFFIXES[projected.dtype]}")(ctypes.byref(call), ctypes.byref(drawing))
    return tokens, logprobs


def _token_logprobs(
    found: ctypes.CDLL,
    projected: Tensor,
    targets: Tensor,
    temperature: float,
    scale: float,
    softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    N, V = projected.shape
    if N and not (int(targets.min()) >= 0 and int(targets.max()) < V):
        raise IndexError(f"targets must be tokens from 0 to {V - 1}, got {int(targets.min())} to {int(targets.max())}")
    targets = targets.long().contiguous()
    logprobs, entropies = torch.empty(2, N, dtype=torch.float32)
    scoring = _Scoring(targets.data_ptr(), temperature, logprobs.data_ptr(), entropies.data_ptr(), gradient)
    call = _call(projected, scale, softcap)
    with record_function(NAME):
        getattr(found, f"score_{SUFFIXES[projected.dtype]}")(ctypes.byref(call), ctypes.byref(scoring))
    return logprobs, entropies


def _call(projected: Tensor, scale: float, softcap: float | None) -> _Call:
    """The argument of the C++, which writes and reads the tensor where it lies."""
    assert projected.stride(1) == 1 or projected.shape[1] == 1
    return _Call(projected.data_ptr(), projected.stride(0), *projected.shape, scale, softcap or 0.0)


OPERATIONS.define(
    "draw(Tensor projected, Tensor? temperature, Tensor uniforms, float scale, float? softcap) -> (Tensor, Tensor)"
)
OPERATIONS.impl("draw", _draw, "CPU")
torch.library.register_fake(
    "rl_lora::draw",
    lambda projected, temperature, uniforms, *_: (
        uniforms.new_empty(len(projected), dtype=torch.int64),
        uniforms.new_empty(len(projected), dtype=torch.float32),
    ),
    lib=OPERATIONS,
)


def _compare(found: ctypes.CDLL, dtype: torch.dtype) -> None:
    """With float64: all that a head may ask for, and a number of tokens that is no multiple of anything."""
    g, R, V = torch.Generator().manual_seed(0), 12, 2637
    for scale, softcap, spread, shift in ((1.0, None, 3.0, -50.0), (0.5, 8.0, 9.0, 0.0)):
        projected = (torch.randn(R, V, generator=g) * spread + shift).to(dtype)
        logits, slope = projected.double() * scale, torch.ones((), dtype=torch.float64)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
            slope = 1 - (logits / softcap) ** 2
        _compare_draw(found, projected, logits, scale, softcap, torch.rand(R, generator=g))
        targets = torch.randint(V, (R,), generator=g)
        for temperature in (1.0, 0.7):
            written = projected.clone()
            results = _token_logprobs(found, written, targets, temperature, scale, softcap, True)
            exact = (logits / temperature).log_softmax(-1)
            entropies = -(exact * exact.exp()).sum(-1)
            of_targets = exact.gather(1, targets[:, None])[:, 0]
            require_all_close("in C++ a token's log-probability differs from float64", results[0], of_targets, 1e-5)
            require_all_close("in C++ an entropy differs from float64", results[1], entropies, 1e-5)
            gradient = (torch.nn.functional.one_hot(targets, V) - exact.exp()) * slope
            ratio, tolerance = written.double() / gradient, torch.finfo(dtype).eps / 2 + 3e-5
            require_all_close(
                "in C++ a gradient of logits differs from float64", ratio, torch.ones_like(ratio), tolerance
            )


def _compare_draw(
    found: ctypes.CDLL, projected: Tensor, logits: Tensor, scale: float, softcap: float | None, uniforms: Tensor
) -> None:
    """logits: float64 (R, V)."""
    temperature = torch.tensor([1.0, 0.7, 0.0]).repeat(len(uniforms) // 3)
    exact = (logits / torch.where(temperature == 0, 1.0, temperature)[:, None]).log_softmax(-1)
    tokens, logprobs = _draw_with(found, projected, temperature, uniforms, scale, softcap)
    tokens = tokens[:, None].clamp(0, projected.shape[1] - 1)  # the comparison may not fail with an error of its own
    of_tokens = exact.gather(1, tokens)[:, 0]
    require_all_close("in C++ the log-probability of a drawn token differs from float64", logprobs, of_tokens, 1e-5)
    end = exact.exp().cumsum(-1).gather(1, tokens)[:, 0]
    target = torch.where(temperature == 0, end, uniforms)
    within = target.clamp(end - of_tokens.exp(), end)
    require_all_close("in C++ the cumulative probability of a drawn token differs from float64", within, target, 1e-6)
    best, greedy = logits.argmax(-1)[temperature == 0], tokens[:, 0][temperature == 0]
    require_all_close("in C++ the most probable token differs from float64", greedy, best.double(), 0)
