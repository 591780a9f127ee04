"""Checkpoints: adapter, optimizer, random states, curriculum, step and config in one folder, there whole or not at all.

A folder is written under a temporary name and renamed. The sampling needs no state: every draw is fixed by the run's
seed, the step and the problem. The random states kept are for what users bring along.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_lora.adapter import Adapter
from rl_lora.adapter_io import save_adapter

PATTERN = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        match = PATTERN.fullmatch(self.folder.name)
        assert match is not None
        return int(match[1])

    @property
    def adapter(self) -> Path:
        """The adapter, as a PEFT folder."""
        return self.folder / "adapter"

    @property
    def state(self) -> dict[str, Any]:
        """step, version, score and the flat config."""
        return json.loads((self.folder / "state.json").read_text())

    @property
    def curriculum(self) -> dict[str, Any]:
        """The state of the run's curriculum, empty without one."""
        path = self.folder / "curriculum.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def restore(self, adapter: Adapter, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        """Put the optimizer, the adapter's version and the random states back. The adapter's weights come first:
        `adapter_io.load_adapter(checkpoint.adapter, ...)`."""
        saved = torch.load(self.folder / "optimizer.pt", map_location=adapter.flat.device, weights_only=True)
        optimizer.load_state_dict(saved)
        adapter.version = self.state["version"]
        states = torch.load(self.folder / "random.pt", weights_only=True)
        if rank < len(states):  # a further process keeps what its seed gave it
            set_random_state(states[rank])


def random_state() -> dict[str, Any]:
    """The global generators of this process: Python, NumPy, torch, and the current GPU."""
    _, keys, *rest = np.random.get_state()
    version, python_keys, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": (version, list(python_keys), gauss),
        "numpy": {"keys": torch.from_numpy(np.asarray(keys).astype(np.int64)), "rest": tuple(rest)},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"]))


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def all(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [Checkpoint(path) for path in self.folder.iterdir() if PATTERN.fullmatch(path.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.all()), None)

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest held-out score; the earliest of equals."""
        scored = [checkpoint for checkpoint in self.all() if checkpoint.state["score"] is not None]
        return max(scored, key=lambda checkpoint: (checkpoint.state["score"], -checkpoint.step), default=None)

    def save(
        self,
        step: int,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        *,
        base_model: str,
        config: dict[str, Any],
        score: float | None,
        random_states: list[dict[str, Any]] | None = None,
        curriculum: dict[str, Any] | None = None,
    ) -> Checkpoint:
        """Write the checkpoint of a step, then remove those that are no longer kept.

        `random_states`: of every process, this one's by default. `curriculum`: its state, if there is one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(".partial-*"):
            shutil.rmtree(left_over)
        partial = self.folder / f".partial-{step:06d}"
        partial.mkdir()
        save_adapter(adapter, partial / "adapter", base_model)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        torch.save(random_states or [random_state()], partial / "random.pt")
        if curriculum is not None:
            (partial / "curriculum.json").write_text(json.dumps(curriculum))
        state = {"step": step, "version": adapter.version, "score": score, "config": config}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        final = self.folder / f"step-{step:06d}"
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        self._prune()
        return Checkpoint(final)

    def _prune(self) -> None:
        kept = {checkpoint.folder for checkpoint in self.all()[-self.keep :]}
        if (best := self.best()) is not None:
            kept.add(best.folder)
        for checkpoint in self.all():
            if checkpoint.folder not in kept:
                shutil.rmtree(checkpoint.folder)
