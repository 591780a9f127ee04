"""One of those that a run trains side by side: what is trained, its checkpoints, its held-out scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from rl_lora.learner.trainable import Trainable
from rl_lora.trainer.checkpoint import Checkpoint, Checkpoints


@dataclass(frozen=True)
class Finished:
    """What a checkpoint keeps beside weights and optimizer, as it was when a step was over: `evaluated`, too, or not
    yet."""

    step: int
    evaluated: bool
    random_states: list[dict[str, Any]]
    curriculum: dict[str, Any] | None


@dataclass
class Member:
    """A trainable of a run, with its checkpoints and its held-out scores by step."""

    trainable: Trainable
    checkpoints: Checkpoints
    scores: dict[int, float] = field(default_factory=dict)

    def is_best(self, step: int) -> bool:
        """Whether a step was evaluated, and better than every trained one before it."""
        others = [score for other, score in self.scores.items() if 0 < other < step]
        return step in self.scores and self.scores[step] > max(others, default=-math.inf)

    def save(
        self, finished: Finished, optimizer: torch.optim.Optimizer, config: dict[str, Any], task: dict[str, Any]
    ) -> Checkpoint:
        """Write the checkpoint of a finished step. Raises FileError."""
        return self.checkpoints.save(
            finished.step,
            self.trainable,
            optimizer,
            config=config,
            score=self.scores.get(finished.step),
            random_states=finished.random_states,
            curriculum=finished.curriculum,
            task=task,
            evaluated=finished.evaluated,
        )
