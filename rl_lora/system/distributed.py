"""What a process must know of the machine before it joins others."""

from __future__ import annotations

import torch


def no_accelerator() -> bool:
    """Whether accelerate must be told that this is a CPU: otherwise it takes each launched process for the only one."""
    return not torch.accelerator.is_available()
