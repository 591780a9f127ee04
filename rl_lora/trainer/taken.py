"""The lock of a run's folder, and whether it holds a run already, which is known before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_lora.config import TrainConfig
from rl_lora.system import files
from rl_lora.system.invocation import is_first_process

CHECKPOINT = re.compile(r"step-(\d{6,})")
"""Names of the folders of checkpoints."""


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """While the block runs, no other run writes to the folder: the first process holds a lock until it ends.

    Raises:
        ValueError: another run has it.
    """
    if not is_first_process():
        yield
        return
    lock = files.lock(run_dir, "another run", "wait until it has ended, or choose another --run_dir")
    try:
        yield
    finally:
        lock.release()


def refuse_taken(config: TrainConfig) -> None:
    """Raises ValueError if a run that is not to be resumed has checkpoints in the folder."""
    checkpoints = Path(config.run_dir) / "checkpoints"
    taken = checkpoints.is_dir() and any(CHECKPOINT.fullmatch(path.name) for path in checkpoints.iterdir())
    if taken and not config.resume:
        raise ValueError(
            f"{config.run_dir} already holds a run; continue it with --resume true, or choose another --run_dir"
        )


def refuse_taken_early(config: TrainConfig) -> None:
    """The same before the run holds its folder: another run that is writing to it is said first."""
    try:
        refuse_taken(config)
    except ValueError:
        files.check_writable(Path(config.run_dir), "run_dir")
        with lock_run_dir(Path(config.run_dir)):
            raise
