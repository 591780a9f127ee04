"""How much memory there is to plan with."""

from __future__ import annotations

import os

import psutil
import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, for this process: on a CPU, processes of one launch share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def budget(gib: float | None, device: torch.device) -> float:
    """So many GiB in bytes, or half of what is free."""
    return free_bytes(device) / 2 if gib is None else gib * GIB
