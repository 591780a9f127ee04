"""Compiles the C++ files of this package once for a machine, and loads them.

Without GCC, or on another system than Linux, torch does the work. The work of a library in a decode step is also an
operation of torch, so that tracer, compiler and profiler can see it: see `dispatched`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rl_lora.system.cache_folder import not_ours, private_folder
from rl_lora.system.openmp import openmp_library

FLAGS = ["-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC"]
OPERATIONS = torch.library.Library("rl_lora", "DEF")


def load(source: Path, *more_flags: str) -> ctypes.CDLL | None:
    """A C++ file of this package, compiled at the first call on a machine; None where it cannot be.

    Only a library that this user has compiled is loaded: its hash is kept beside it.
    """
    flags, compiler, openmp = [*FLAGS, *more_flags], shutil.which("g++"), openmp_library()
    if compiler is None or openmp is None:
        return None
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith(("model name", "flags"))
    ]
    version = str(Path(compiler).resolve().stat().st_mtime_ns)
    sources = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    text = "\n".join([*sources, compiler, version, openmp, *flags, *cpu[:2]])
    try:
        if (folder := private_folder("compiled")) is None:
            return None
        path = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if _is_as_made(path):
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # another system's: made anew
                pass
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made, record = Path(work, path.name), Path(work, _record(path).name)
            subprocess.run([compiler, *flags, source, openmp, "-o", made], check=True, capture_output=True)
            record.write_text(_hash(made), encoding="utf-8")
            path.unlink(missing_ok=True)
            for new, kept in ((record, _record(path)), (made, path)):
                new.chmod(0o600)
                with new.open("rb") as file:
                    os.fsync(file.fileno())  # half of one, after a loss of power, would not fail to load but crash
                os.replace(new, kept)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # nowhere to keep it, another kind of processor
        return None


def _is_as_made(path: Path) -> bool:
    """Whether a library is there, is this user's, and is what was compiled; a warning where it has been changed."""
    record = _record(path)
    if not path.exists() or not record.exists():
        return False
    reason = not_ours(path) or not_ours(record)
    if reason is None and _hash(path) != record.read_text(encoding="utf-8"):
        reason = f"{path} is not what was compiled"
    if reason:
        warnings.warn(f"C++ is compiled anew: {reason}", stacklevel=3)
    return reason is None


def _record(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_dispatched = False  # of all threads: nothing else decodes while a layer is compiled


@contextmanager
def dispatched() -> Iterator[None]:
    """Inside, C++ is called through torch's dispatcher, where tracer, compiler and profiler see it."""
    global _dispatched
    before, _dispatched = _dispatched, True
    try:
        yield
    finally:
        _dispatched = before


def is_dispatched() -> bool:
    return _dispatched


def dense(x: Tensor) -> Tensor:
    """The tensor with the numbers of its last dimension side by side, as the C++ reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()
