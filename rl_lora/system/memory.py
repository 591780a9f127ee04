"""How much memory there is to plan with, and how a CPU's is allocated."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

import psutil
import torch

GIB = 2**30
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""


@functools.cache
def ready_memory() -> bool:
    """Make large tensors cheap to allocate on a CPU, for this process; returns whether freed memory is kept.

    glibc gives large blocks back to the system at once, and the next tensor of that size waits for fresh pages, which
    may take several times as long as the arithmetic on it: learning from 4,534 tokens took 17 s so on one machine, and
    13 s as here. Freed memory is kept, and pages are large where the kernel has them (torch reads
    `THP_MEM_ALLOC_ENABLE` when it first allocates). Nothing is changed that the environment already says
    (`MALLOC_...`, `GLIBC_TUNABLES`), nor where the C library is another.
    """
    if LARGE_PAGES.exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    asked = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if asked or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


MALLINFO2 = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _MallInfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2)


def kept_bytes() -> int:
    """What this process has freed and not given back, at least: not all that was allocated has ever been touched."""
    if not ready_memory():
        return 0
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # glibc before 2.33
        return 0
    mallinfo2.restype = _MallInfo2
    heap = mallinfo2()
    return max(0, min(heap.fordblks, psutil.Process().memory_info().rss - heap.uordblks))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, and what this process keeps; on a CPU, processes of one launch share the former."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) + kept_bytes()


def budget(gib: float | None, device: torch.device) -> float:
    """So many GiB in bytes, or half of what is free."""
    return free_bytes(device) / 2 if gib is None else gib * GIB
