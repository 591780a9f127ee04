"""The dtype that a machine computes in: measured where its instructions alone do not tell."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch

Dtype = Literal["auto", "float32", "bfloat16"]


def compute_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of the base and of the activations; adapters are float32 always.

    A CPU that has instructions for bfloat16 is timed: on some of them float32 is nearly twice as fast all the same.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and _multiplies_bfloat16():
        of = seconds_of_product()
        return torch.bfloat16 if of[torch.bfloat16] < of[torch.float32] else torch.float32
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it."""
    native = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(supported() for supported in native if supported)


@functools.cache
def seconds_of_product() -> dict[torch.dtype, float]:
    """A product of a decoding step's rows on this CPU in either dtype, the best of some; 0.1 s to find out.

    Processors are far from a tie: bfloat16 takes 0.4 of the time where the instructions do twice the work, 1.5 to 1.9
    where they are split into several; the fastest products suffer most from what else runs on a core.

    What other processes take counts little: it is one thread's own time, as several would wait for one that does not
    run, and in turns, on matrices that stay in a core's cache.
    """
    sides = {
        dtype: (torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in sides}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(48):
            for dtype, (x, weight) in sides.items():
                start = time.thread_time()
                torch.nn.functional.linear(x, weight)
                seconds[dtype].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {dtype: min(times) for dtype, times in seconds.items()}
