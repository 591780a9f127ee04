"""Large pages, and free memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rl_lora.system import memory


@pytest.mark.skipif(
    not memory.LARGE_PAGES.exists() or "[madvise]" not in memory.LARGE_PAGES.read_text(),
    reason="the kernel does not give large pages to who asks for them",
)
@pytest.mark.parametrize(("given", "large"), [(None, True), ("0", False)])
def test_large_tensors_lie_in_large_pages(given: str | None, large: bool) -> None:
    """In a process of its own, since torch looks once; what the environment says already, stays."""
    script = """
from rl_lora.system.memory import ready_memory
ready_memory()
import torch
x = torch.ones(1 << 26)
print([line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")][0])
"""
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    env |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 0) == large


def test_free_memory_counts_what_is_kept() -> None:
    """What a tensor has freed is free, whether the system has it back or not; in a process of its own, whose heap holds
    little else."""
    script = """
import ctypes, torch
from rl_lora.system.memory import kept_bytes, ready_memory
kept = ready_memory() and hasattr(ctypes.CDLL(None), "mallinfo2")
before = kept_bytes()
x = torch.ones(1 << 30, dtype=torch.uint8)
during = kept_bytes()
del x
print(int(kept), (during - before) >> 20, (kept_bytes() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, during, after = map(int, done.stdout.split())
    assert during < 64
    assert after > 512 if kept else after == 0
