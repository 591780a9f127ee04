"""Checkpoints: weights, optimizer, random states, curriculum, step and config in one folder, there whole or not at all.

A folder is written under a temporary name and renamed, and removed the other way round. `state.json` has a hash of
every file and of itself: a checkpoint that was damaged later is told from a whole one. The sampling needs no state:
every draw is fixed by the run's seed, the step and the problem. The random states kept are for what users bring along.
"""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_lora.learner.trainable import Trainable
from rl_lora.lora.peft_io import check_adapter
from rl_lora.metrics.samples import content_hash
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.trainer.taken import CHECKPOINT

STATE, OPTIMIZER, RANDOM, CURRICULUM = "state.json", "optimizer.pt", "random.pt", "curriculum.json"
FIELDS = {"step": int, "version": int, "score": int | float | None, "config": dict}
"""Of state.json, in every version."""
COPY = "put it back from a copy, or remove this checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        match = CHECKPOINT.fullmatch(self.folder.name)
        assert match is not None
        return int(match[1])

    @property
    def adapter(self) -> Path:
        """The folder of an adapter, in PEFT's format."""
        return self.folder / "adapter"

    @property
    def state(self) -> dict[str, Any]:
        """step, version, score and the flat config; `task` (`task.task_record`) and `evaluated` (whether the evaluation
        of the step was over), which older checkpoints lack."""
        path = self.folder / STATE
        try:
            state = files.read_json(path, COPY)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; {COPY}") from None
        if not isinstance(state, dict) or not state.keys() >= FIELDS.keys():
            raise ValueError(f"{path} is damaged (it lacks one of {', '.join(sorted(FIELDS))}); {COPY}")
        if wrong := [name for name, kind in FIELDS.items() if not isinstance(state[name], kind)]:
            raise ValueError(f"{path} is damaged ({wrong[0]} is {state[wrong[0]]!r:.60}); {COPY}")
        return state

    @property
    def curriculum(self) -> dict[str, Any]:
        """The state of the run's curriculum, empty without one."""
        path = self.folder / CURRICULUM
        return files.read_json(path, COPY) if path.exists() else {}

    def damage(self) -> str | None:
        """The first file that is not what was written, and why; None if all are whole."""
        try:
            state = self.state
        except (ValueError, OSError) as error:
            return str(error).removesuffix(f"; {COPY}")
        if not state.keys() & {"files", "hash"}:
            return self._damage_by_reading()
        if state.pop("hash", None) != content_hash(state):
            return f"{self.folder / STATE} has changed since it was written"
        for name, known in state["files"].items():
            path = self.folder / name
            if not path.is_file():
                return f"{path} is missing"
            if (there := path.stat().st_size) != known["bytes"]:
                return f"{path} has {there} bytes, {known['bytes']} were written"
            if files.file_hash(path) != known["sha256"]:
                return f"{path} has changed since it was written"
        return None

    def _damage_by_reading(self) -> str | None:
        """Of a checkpoint from before there were hashes."""
        try:
            check_adapter(self.adapter)
            self.curriculum  # noqa: B018
        except (ValueError, OSError) as error:
            return str(error).removesuffix(f"; {COPY}")
        for path in (self.folder / OPTIMIZER, self.folder / RANDOM):
            try:
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        return f"{path} is damaged at {part}"
            except FileNotFoundError:
                return f"{path} is missing"
            except (zipfile.BadZipFile, OSError, EOFError) as error:
                return f"{path} is damaged ({error})"
        return None

    def restore(
        self, trainable: Trainable, optimizer_of: Callable[[Trainable], torch.optim.Optimizer], rank: int = 0
    ) -> None:
        """Put weights, optimizer, version and random states back. `optimizer_of` is asked when the weights are there.

        Raises:
            ValueError: a file cannot be read, or is of something else.
        """
        trainable.load(self.folder / trainable.folder)
        device = trainable.weights[0].device
        optimizer_of(trainable).load_state_dict(_load(self.folder / OPTIMIZER, device))
        trainable.version = self.state["version"]
        states = _load(self.folder / RANDOM, "cpu")
        if rank < len(states):  # a further process keeps what its seed gave it
            set_random_state(states[rank])


def _load(path: Path, device: torch.device | str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each have errors of their own
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); {COPY}") from error


def check_whole(adapter: Path) -> None:
    """Raises ValueError if an adapter folder is part of a checkpoint that is damaged."""
    if adapter.name == "adapter" and CHECKPOINT.fullmatch(adapter.parent.name):
        checkpoint = Checkpoint(adapter.parent)
        if (checkpoint.folder / STATE).exists() and (damage := checkpoint.damage()) is not None:
            raise ValueError(f"{damage}: the checkpoint is damaged; {COPY}")


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
        self._found: dict[tuple[Any, ...], str | None] = {}
        """What was found by looking into files of these sizes and times."""

    def all(self) -> list[Checkpoint]:
        """Those that are there, oldest first, damaged ones too."""
        if not self.folder.is_dir():
            return []
        found = [Checkpoint(path) for path in self.folder.iterdir() if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def damage(self, checkpoint: Checkpoint) -> str | None:
        """`Checkpoint.damage`; files that have not been touched are read once."""
        key = _signature(checkpoint.folder)
        if key not in self._found:
            self._found[key] = checkpoint.damage()
        return self._found[key]

    def whole(self) -> list[Checkpoint]:
        """Those that one can go on from, oldest first."""
        return [checkpoint for checkpoint in self.all() if self.damage(checkpoint) is None]

    def latest(self) -> Checkpoint | None:
        """The newest that is whole."""
        return next((checkpoint for checkpoint in reversed(self.all()) if self.damage(checkpoint) is None), None)

    def damaged(self) -> list[str]:
        """What is wrong with those that are newer than the newest whole one."""
        latest = self.latest()
        newer = [checkpoint for checkpoint in self.all() if latest is None or checkpoint.step > latest.step]
        return [damage for checkpoint in newer if (damage := self.damage(checkpoint)) is not None]

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest held-out score; the earliest of equals."""
        scored = [checkpoint for checkpoint in self.whole() if checkpoint.state["score"] is not None]
        return max(scored, key=lambda checkpoint: (checkpoint.state["score"], -checkpoint.step), default=None)

    def save(
        self,
        step: int,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer,
        *,
        config: dict[str, Any],
        score: float | None,
        random_states: list[dict[str, Any]] | None = None,
        curriculum: dict[str, Any] | None = None,
        **more: Any,
    ) -> Checkpoint:
        """Write the checkpoint of a step, then remove those that are no longer kept.

        `random_states`: of every process, this one's by default. `curriculum`: its state, if there is one. `more`: what
        else `state.json` is to hold.

        Raises:
            FileError: the disk is full, say. The checkpoints that were there are there.
        """
        final = self.folder / f"step-{step:06d}"
        with files.new_folder(final) as partial:
            trainable.save(partial / trainable.folder)
            _save(optimizer.state_dict(), partial / OPTIMIZER)
            _save(random_states or [random_state()], partial / RANDOM)
            if curriculum is not None:
                files.write_text(partial / CURRICULUM, json.dumps(curriculum))
            written = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            hashes = {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": files.file_hash(path)}
                for path in written
            }
            state = {"step": step, "version": trainable.version, "score": score, "config": config, **more}
            state = json.loads(json.dumps(state | {"files": hashes}))  # as it will be read
            files.write_text(partial / STATE, json.dumps(state | {"hash": content_hash(state)}, indent=1))
        self._found[_signature(final)] = None
        self._prune()
        return Checkpoint(final)

    def tidy(self) -> None:
        """Delete what a process that died was writing or removing, or would have removed."""
        files.clear_left_overs(self.folder, "step-*")
        self._prune()

    def _prune(self) -> None:
        """Of whole ones, the newest and the best stay. Damaged ones go when a newer one is whole."""
        whole = self.whole()
        kept = {checkpoint.folder for checkpoint in whole[-self.keep :]}
        if (best := self.best()) is not None:
            kept.add(best.folder)
        for checkpoint in self.all():
            if checkpoint.folder not in kept and whole and checkpoint.step <= whole[-1].step:
                files.remove_folder(checkpoint.folder)


def _save(value: Any, path: Path) -> None:
    """By way of memory: torch's own writer tells of a full disk in words of its own."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    files.write_bytes(path, buffer.getbuffer())


def _signature(folder: Path) -> tuple[Any, ...]:
    stats = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)
