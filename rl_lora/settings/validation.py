"""Settings that cannot be meant, found before anything is loaded: numbers out of bounds, and settings that exclude
each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.settings import algorithm
from rl_lora.settings.bounds import out_of_bounds


def validate(config: TrainConfig) -> None:
    """Raises ValueError that names every setting that cannot be meant."""
    refuse([*out_of_bounds(config), *_larger_than_another(config), *algorithm.faults(config)])


def validate_evaluation(config: EvaluateConfig) -> None:
    """Raises ValueError that names every setting that cannot be meant; what is left to the runs can."""
    refuse([*out_of_bounds(config), *_against_samples(config)])


def validate_bounds(config: Any) -> None:
    """Raises ValueError that names every number out of the bounds that any config declares."""
    refuse(out_of_bounds(config))


def refuse(wrong: list[str]) -> None:
    """Raises ValueError with all messages, if there are any."""
    if wrong:
        raise ValueError("; ".join(wrong))


def _larger_than_another(c: TrainConfig) -> Iterator[str]:
    most, groups = c.rollout.max_tokens, c.rollout.prompts_per_step
    if c.rollout.overlong_tokens > most:
        yield f"rollout.overlong_tokens must be <= rollout.max_tokens={most}, got {c.rollout.overlong_tokens}"
    if c.learner.updates_per_step > groups:
        yield f"learner.updates_per_step must be <= rollout.prompts_per_step={groups}, got {c.learner.updates_per_step}"


def _against_samples(c: EvaluateConfig) -> Iterator[str]:
    if c.n > 1 and c.temperature == 0:
        yield f"n must be 1 at temperature 0, got {c.n}: greedy samples are all the same"
    if bad := [k for k in c.k if not 1 <= k <= c.n]:
        yield f"k must be from 1 to n={c.n}, the samples of a problem, got {', '.join(map(str, bad))}"
