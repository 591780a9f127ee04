"""How much memory there is to plan with, and how a CPU's is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

GIB = 2**30
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_large_pages() -> None:
    """Let torch allocate large tensors in large pages on a CPU, where the kernel has them, for this process.

    The C library gives large blocks back to the system, and the next tensor of that size waits for fresh pages: in
    small ones, that may take longer than the arithmetic on it. torch reads this when it first allocates.
    """
    if LARGE_PAGES.exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, for this process: on a CPU, processes of one launch share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def budget(gib: float | None, device: torch.device) -> float:
    """So many GiB in bytes, or half of what is free."""
    return free_bytes(device) / 2 if gib is None else gib * GIB
