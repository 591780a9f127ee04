"""Settings that cannot be meant, found before anything is loaded: numbers out of bounds, and settings that exclude
each other."""

from __future__ import annotations

from collections.abc import Iterator

from rl_lora.config import TrainConfig
from rl_lora.settings import algorithm
from rl_lora.settings.bounds import out_of_bounds


def validate(config: TrainConfig) -> None:
    """Raises ValueError that names every setting that cannot be meant."""
    wrong = [*out_of_bounds(config), *_larger_than_another(config), *algorithm.faults(config)]
    if wrong:
        raise ValueError("; ".join(wrong))


def _larger_than_another(c: TrainConfig) -> Iterator[str]:
    most, groups = c.rollout.max_tokens, c.rollout.prompts_per_step
    if c.rollout.overlong_tokens > most:
        yield f"rollout.overlong_tokens must be <= rollout.max_tokens={most}, got {c.rollout.overlong_tokens}"
    if c.learner.updates_per_step > groups:
        yield f"learner.updates_per_step must be <= rollout.prompts_per_step={groups}, got {c.learner.updates_per_step}"
