"""C++ of our own, for what CPUs are slow at otherwise: compiled once for a machine, and loaded.

Wherever it cannot be had, without GCC or on another system, torch does the work. What a library computes is an
operation of torch's too, so that its tracer, compiler and profiler can see it: see `followed`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rl_lora.cache import cache_folder

FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC"]
OPERATIONS = torch.library.Library("rl_lora", "DEF")


def load(source: Path, *more_flags: str) -> ctypes.CDLL | None:
    """A compiled file of this package; None where it cannot be had."""
    flags = [*FLAGS, *more_flags]
    compiler = shutil.which("g++")
    try:
        maps, cpu = (Path("/proc", file).read_text() for file in ("self/maps", "cpuinfo"))
    except OSError:  # no Linux
        return None
    # The threads must be torch's own: others would wait beside them, spinning.
    openmp = next((word for word in maps.split() if Path(word).name.startswith("libgomp")), None)
    if compiler is None or openmp is None:
        return None
    kind = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))][:2]
    key = hashlib.sha256("\n".join([source.read_text(), compiler, openmp, *flags, *kind]).encode()).hexdigest()[:16]
    folder = cache_folder() / "compiled"
    path = folder / f"{source.stem}-{key}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = Path(work, path.name)
                subprocess.run([compiler, *flags, source, openmp, "-o", made], check=True, capture_output=True)
                os.replace(made, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):  # no room, another processor, a compiler without OpenMP
        return None


_followed = False


@contextmanager
def followed() -> Iterator[None]:
    """Inside, what is done in C++ is done through torch's dispatcher, where it can be followed."""
    global _followed
    before, _followed = _followed, True
    try:
        yield
    finally:
        _followed = before


def is_followed() -> bool:
    return _followed
