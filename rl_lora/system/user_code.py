"""Which lines of a traceback, or of a call that is under way, are a user's own."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import gymnasium as gym

MAX_FRAMES = 6
"""Lines of code that a message shows."""
CORE = Path(__file__).parents[1]
BESIDE = tuple(CORE / name for name in ("envs", "rewards", "scripts"))
"""In a clone links to folders beside the core."""
OURS = tuple(folder.resolve() for folder in (CORE, *BESIDE, Path(gym.__file__).parent))
"""Environments are called through gymnasium's wrappers."""
PYTHON = Path(sysconfig.get_path("stdlib")).resolve()
LIBRARIES = tuple({Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")})


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a traceback that are a user's, neither of this package nor of an installed library, and the last
    one, where it happened; of the first exception in a chain of causes that has such. Where there are none, the last
    ones of installed libraries: a user's environment may be one."""
    frames: list[traceback.FrameSummary] = []
    for link in causes(error):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if not _is_under(frame, OURS)]
        if found := user_lines(frames):
            return [*found, *(frames[-1:] if frames[-1] is not found[-1] else [])]
    return [frame for frame in frames if _is_under(frame, LIBRARIES)][-MAX_FRAMES:]


def is_core(file: Path) -> bool:
    """Whether a file of code belongs to the core, which calls environments and rewards."""
    return file.is_relative_to(CORE) and not any(file.is_relative_to(folder) for folder in BESIDE)


def user_lines(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The last frames that are neither of this package nor of an installed library."""
    return [frame for frame in frames if not _is_under(frame, (*OURS, *LIBRARIES, PYTHON))][-MAX_FRAMES:]


def user_sources(names: Iterable[str]) -> list[str]:
    """The sources of modules, and of those that they import, as far as they are a user's own, in a fixed order. Of a
    script that is run, only what it imports: `__main__` itself may be edited."""
    found: dict[str, str] = {}
    rest, seen = list(names), set[str]()
    while rest:
        name = rest.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen.add(name)
        if name != "__main__":
            file = getattr(module, "__file__", None)
            if file is None or _of(Path(file), (*OURS, *LIBRARIES, PYTHON)):
                continue
            with suppress(OSError):
                found[name] = Path(file).read_bytes().decode("utf-8", "replace")
        for value in list(vars(module).values()):
            with suppress(Exception):  # a proxy of something that is not there yet
                rest.append(value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", "")))
    return [found[name] for name in sorted(found)]


def causes(error: BaseException) -> list[BaseException]:
    """An exception, its cause, the cause of that, ..."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _is_under(frame: traceback.FrameSummary, folders: tuple[Path, ...]) -> bool:
    made = (frame.filename, frame.name) == ("<string>", "__init__")  # by `dataclass`
    compiled = frame.filename.endswith((".pxi", ".pyx"))  # of a library; where it was built is not here
    return made or compiled or frame.filename.startswith("<frozen") or _of(Path(frame.filename), folders)


def _of(file: Path, folders: tuple[Path, ...]) -> bool:
    path = file.resolve()
    if path.is_relative_to(PYTHON) and not any(path.is_relative_to(folder) for folder in LIBRARIES):
        return PYTHON in folders  # installed libraries have their place inside Python's own
    return any(path.is_relative_to(folder) for folder in folders)
