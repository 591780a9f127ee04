"""How threads that compute together on a CPU wait for each other: awake while the cores are theirs, asleep beside other
processes.

Threads of GNU's OpenMP, which torch ships, try again and again for some milliseconds before they sleep. Nothing is
faster on a machine of one's own. Beside another process they take the core from the very thread that they wait for,
and decoding hardly goes on (`benchmark_neighbour.py --as_torch true`). The library lets them sleep after some
microseconds while it has more threads than there are cores, so a team of idle threads is kept for as long as others
compute. Results do not depend on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from pathlib import Path

import torch

from rl_lora.system.openmp import openmp_library

OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
"""Environment variables that say how threads wait, or where they run: who has set one has chosen."""
LOOK = 0.1
"""Seconds between two looks at the machine."""
RISING, FALLING = 0.2, 0.5
"""Of the newest look in the average of what others take: a neighbour is believed to have gone sooner than to have come,
since waiting asleep costs half as much again for as long as it is wrong."""
CROWDED, ALONE = 0.3, 0.15
"""Cores that are lacking, on average: from the first on, threads sleep; below the second they stay awake again."""
STATISTICS = Path("/proc/stat")
BUSY = (1, 2, 3, 6, 7)
"""Columns of a core in /proc/stat, in ticks: user, nice, system, irq, softirq."""


@functools.cache
def watch_neighbours() -> bool:
    """Let this process's threads wait as suits the machine, from now on; returns whether it is watched.

    Left alone are another library than GNU's, a single core, a system without /proc/stat, and processes whose
    environment has one of `OF_THE_USER`.
    """
    library, cores = openmp_library(), _cores()
    if library is None or len(cores) < 2 or not STATISTICS.exists() or any(name in os.environ for name in OF_THE_USER):
        return False
    threading.Thread(
        target=_watch, args=(IdleTeam(library, len(cores) + 1), cores), name="neighbours", daemon=True
    ).start()
    return True


class IdleTeam:
    """Threads of OpenMP that do nothing but be there.

    Args:
        library: path of GNU's OpenMP library, the one that is loaded.
        n: threads of the team.
    """

    def __init__(self, library: str, n: int):
        self.n, self.end = n, threading.Event()
        self.thread: threading.Thread | None = None
        self._parallel = ctypes.CDLL(library).GOMP_parallel
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None

    def start(self) -> None:
        if self.thread is None:
            self.end.clear()
            self.thread = threading.Thread(target=self._stay, name="idle team", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """The team ends with the thread that has started it."""
        if self.thread is not None:
            self.end.set()
            self.thread.join()
            self.thread = None

    def _stay(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
        self._parallel(nothing, None, self.n, 0)
        self.end.wait()


def _watch(team: IdleTeam, cores: set[int]) -> None:
    lacking, before = 0.0, _used(cores)
    while True:
        time.sleep(LOOK)
        now = _used(cores)
        seconds, all_processes, this_one = (b - a for a, b in zip(before, now, strict=True))
        before, threads = now, torch.get_num_threads()
        newest = max(0.0, threads + (all_processes - this_one) / seconds - len(cores))
        lacking += (RISING if newest > lacking else FALLING) * (newest - lacking)
        if 1 < threads <= len(cores) and lacking > CROWDED:
            team.start()
        elif lacking < ALONE:
            team.stop()


def _used(cores: set[int]) -> tuple[float, float, float]:
    """Seconds: of the clock, of all processes on these cores, and of this process on any."""
    lines = STATISTICS.read_text(encoding="utf-8").splitlines()
    of_cores = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    ticks = sum(int(columns[i]) for columns in of_cores if int(columns[0][3:]) in cores for i in BUSY)
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def _cores() -> set[int]:
    """Those that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
