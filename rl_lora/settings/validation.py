"""Settings that cannot be meant, found before anything is loaded: numbers out of bounds, and settings that exclude
each other."""

from __future__ import annotations

from collections.abc import Iterator

from rl_lora.config import TrainConfig, advantage_of
from rl_lora.settings.bounds import out_of_bounds
from rl_lora.settings.dotted import as_typed


def validate(config: TrainConfig) -> None:
    """Raises ValueError that names every setting that cannot be meant."""
    wrong = [*out_of_bounds(config), *_larger_than_another(config), *_against_objective(config)]
    if wrong:
        raise ValueError("; ".join(wrong))


def _larger_than_another(c: TrainConfig) -> Iterator[str]:
    most, groups = c.rollout.max_tokens, c.rollout.prompts_per_step
    if c.rollout.overlong_tokens > most:
        yield f"rollout.overlong_tokens must be <= rollout.max_tokens={most}, got {c.rollout.overlong_tokens}"
    if c.learner.updates_per_step > groups:
        yield f"learner.updates_per_step must be <= rollout.prompts_per_step={groups}, got {c.learner.updates_per_step}"


def _against_objective(c: TrainConfig) -> Iterator[str]:
    if c.learner.objective == "likelihood":
        if c.rollout.group_size != 1:
            yield f"rollout.group_size must be 1 for demonstrations, got {c.rollout.group_size}"
        if advantage_of(c.learner) != "none":
            yield f"learner.advantage must be none for demonstrations, got {as_typed(c.learner.advantage)}"
        if c.shuffle_rewards:
            yield "shuffle_rewards has no meaning for demonstrations: they carry no rewards"
        if c.rollout.curriculum != "none":
            yield "rollout.curriculum must be none for demonstrations: they neither succeed nor fail"
        if c.rollout.overlong_tokens or c.rollout.brevity_weight is not None:
            yield "rollout.overlong_tokens and brevity_weight have no meaning for demonstrations"
    elif c.rollout.group_size == 1 and advantage_of(c.learner) != "none":
        yield (
            f"rollout.group_size must be >= 2, got 1: with the {advantage_of(c.learner)} advantage a group of one has "
            "no signal; raise it, or set learner.advantage to none"
        )
