"""The objective and the advantage that a configuration names: their records, their options, and what they rule out."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from rl_lora.algorithms.advantages import ADVANTAGES
from rl_lora.algorithms.objectives import OBJECTIVES, Objective
from rl_lora.algorithms.registry import Registry
from rl_lora.config import LearnerConfig, TrainConfig
from rl_lora.settings.dotted import as_typed


def objective_of(learner: LearnerConfig) -> Objective:
    """Raises ValueError if there is no objective of that name."""
    return OBJECTIVES[learner.objective]


def advantage_of(learner: LearnerConfig) -> str:
    """The name of the advantage, the objective's default applied."""
    return learner.advantage or objective_of(learner).advantage


def objective_options(learner: LearnerConfig) -> dict[str, Any]:
    """The options of the objective: its defaults, settings of the learner by the same name, `objective_options`."""
    defaults = objective_of(learner).options
    settings = {name: getattr(learner, name) for name in defaults if name in _settings()}
    return defaults | settings | learner.objective_options


def registries(config_type: type[Any]) -> dict[str, Registry[Any]]:
    """The settings of a config that name records, `Annotated[str, registry]`, each with its registry."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    found = ((name, getattr(hint, "__metadata__", ())) for name, hint in hints.items())
    return {name: one for name, metadata in found for one in metadata if isinstance(one, Registry)}


def faults(config: TrainConfig) -> list[str]:
    """What of the configuration the objective or the advantage rules out."""
    learner = config.learner
    try:
        objective = objective_of(learner)
    except ValueError as error:
        return [f"learner.objective: {error}"]
    try:
        advantage = ADVANTAGES[advantage_of(learner)]
    except ValueError as error:
        return [f"learner.advantage: {error}"]
    found = list(_option_faults(learner, objective))
    learned = "demonstrations" if not objective.needs_samples else f"the objective {learner.objective}"
    if not objective.needs_samples:
        if config.rollout.group_size != 1:
            found.append(f"rollout.group_size must be 1 for {learned}, got {config.rollout.group_size}")
        if config.rollout.curriculum != "none":
            found.append(f"rollout.curriculum must be none for {learned}: they neither succeed nor fail")
    if not objective.needs_rewards:
        if advantage_of(learner) != objective.advantage:
            given = as_typed(learner.advantage)
            found.append(f"learner.advantage must be {objective.advantage} for {learned}, got {given}")
        if config.shuffle_rewards:
            found.append(f"shuffle_rewards has no meaning for {learned}: they carry no rewards")
        if config.rollout.overlong_tokens or config.rollout.brevity_weight is not None:
            found.append(f"rollout.overlong_tokens and brevity_weight have no meaning for {learned}")
    elif config.rollout.group_size == 1 and advantage.compares:
        found.append(
            f"rollout.group_size must be >= 2, got 1: with the {advantage_of(learner)} advantage a group of one has "
            "no signal; raise it, or set learner.advantage to none"
        )
    return found


def _option_faults(learner: LearnerConfig, objective: Objective) -> Iterator[str]:
    name_of, own, settings = learner.objective, objective.options, _settings()
    takers = {name: record.name for record in OBJECTIVES.records.values() for name in record.options}
    for name, taker in takers.items():
        if name in settings and name not in own and getattr(learner, name) != settings[name]:
            yield (
                f"learner.{name} is an option of the objective {taker}, and {name_of} does not take it; leave it out, "
                f"or set learner.objective to {taker}"
            )
    for name, default in own.items():
        if name in settings and settings[name] != default:
            yield (
                f"learner.objective: the option {name} of {name_of} is called like the setting learner.{name}, and has "
                f"another default ({default}, not {settings[name]}); give it another name"
            )
    for name, value in learner.objective_options.items():
        place = f"learner.objective_options.{name}"
        if name in settings and name in own:
            yield f"{place} is a setting of its own: --learner.{name}"
        elif name not in own:
            close = difflib.get_close_matches(name, own, n=1)
            meant = f"; {name} may be meant for {close[0]}" if close else ""
            there = f"its options are {', '.join(own)}" if own else "it has none"
            yield f"{place}: the objective {name_of} has no option {name}{meant}; {there}"
        elif not _fits(value, own[name]):
            yield f"{place} must be like its default, {as_typed(own[name])}, got {as_typed(value)}"


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return default is None or type(value) is type(default)


def _settings() -> dict[str, Any]:
    """The defaults of the learner's settings."""
    return {field.name: getattr(LearnerConfig(), field.name) for field in dataclasses.fields(LearnerConfig)}
