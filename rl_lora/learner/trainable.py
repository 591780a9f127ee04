"""What is trained, as learner, trainer and checkpoints know it. `lora.trainable_adapter` has the case of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn


class Trainable(Protocol):
    """Weights that an optimizer moves, with gradients to add up over processes and a state to keep."""

    folder: str
    """Name of the folder that holds its state, in a checkpoint and in a run."""
    version: int
    """Optimizer steps so far. Whoever takes a step adds one."""

    @property
    def tag(self) -> str | None:
        """The tag of groups, and of rows in a forward pass, that its weights compute; None: that of the bare base."""
        ...

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """All weights. Few large ones are best: each is reduced, measured and moved by calls of its own."""
        ...

    def initialize(self, seed: int) -> None:
        """Make fresh weights, where it begins from none that were saved."""
        ...

    def zero_grad(self) -> None:
        """Give every weight a `grad` of zeros, which backward passes add to."""
        ...

    def norms(self) -> dict[str, float]:
        """Euclidean norms of its parts, by their names in metrics.jsonl."""
        ...

    def save(self, folder: Path) -> None:
        """Write its weights into a new folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` has written. Raises ValueError if the files are damaged or of something else."""
        ...
