"""How this program was started, and so how a command of the project is typed in the same place."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

COMMAND = "rl-lora"
PACKAGE = Path(__file__).resolve().parents[1]
UNDER_LAUNCHER = "TORCHELASTIC_RUN_ID" in os.environ
"""Whether this process was started by torchrun, or by accelerate, which calls it for several processes."""
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers say the rank of a process."""


def words(subcommand: str) -> list[str]:
    """The words that start `rl-lora SUBCOMMAND` here: in the way that this program was started; from Python, by the
    clone's script or the installed command."""
    started, script = Path(sys.argv[0]), PACKAGE.parent / "scripts" / f"{subcommand}.py"
    if started.stem == COMMAND:
        return [_found(started), subcommand]
    if started.name == "__main__.py" and started.absolute().parent.samefile(PACKAGE):
        return [_python(), "-m", PACKAGE.name, subcommand]
    if (PACKAGE.parent / "setup.cfg").is_file() and script.is_file():
        return [_python(), _shown(script)]
    return [_found(Path(sys.executable).with_name(COMMAND)), subcommand]


def launcher() -> list[str]:
    """The command line of the accelerate or torchrun that started this process as one of several; else nothing."""
    if not UNDER_LAUNCHER:
        return []
    import psutil

    _, program, *args = psutil.Process(os.getppid()).cmdline()
    return [_python(), program, *args] if program.startswith("-") else [_found(Path(program)), *args]


def _python() -> str:
    """This Python, as a command typed here would name it: an environment of the project is seldom activated."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else _found(python, "python")


def _found(program: Path, name: str = "") -> str:
    """The name alone where a shell that is given it starts this file, else its path. Links are not followed: nor is a
    virtual environment's."""
    found = shutil.which(name or program.name)
    is_found = found is not None and os.path.abspath(found) == os.path.abspath(program)
    return name or program.name if is_found else _shown(program)


def _shown(path: Path) -> str:
    """A path as it can be typed here."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process; known before the processes speak to each other."""
    ranks = (os.environ.get(name) for name in RANKS)
    return next((int(rank) for rank in ranks if rank), 0) == 0
