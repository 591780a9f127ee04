"""Numbers are within the bounds that their fields declare, or named with the bound; and the help tells the bounds."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Annotated, Any, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt, Unit

from rl_lora.config import (
    AdapterConfig,
    CheckpointConfig,
    EvalConfig,
    EvaluateConfig,
    LearnerConfig,
    LogConfig,
    RolloutConfig,
    TrainConfig,
)
from rl_lora.scripts.configs import SftConfig
from rl_lora.settings.bounds import Bounds, bounded, bounds_of, out_of_bounds
from rl_lora.settings.validation import validate, validate_evaluation

GROUPS: dict[str, type[Any]] = {
    "": TrainConfig,
    "adapter.": AdapterConfig,
    "rollout.": RolloutConfig,
    "learner.": LearnerConfig,
    "eval.": EvalConfig,
    "checkpoint.": CheckpointConfig,
    "log.": LogConfig,
}
NUMBERS = [
    (TrainConfig, prefix + name, bounds)
    for prefix, group in GROUPS.items()
    for name, hint in get_type_hints(group, include_extras=True).items()
    if (bounds := bounds_of(hint))
] + [
    (EvaluateConfig, name, bounds)
    for name, hint in get_type_hints(EvaluateConfig, include_extras=True).items()
    if (bounds := bounds_of(hint))
]
"""Every number with bounds that a run or an evaluation has."""


def with_value(config: Any, name: str, value: Any) -> Any:
    """A config in which one setting is another."""
    group, dot, inner = name.partition(".")
    if dot:
        value = with_value(getattr(config, group), inner, value)
    elif isinstance(getattr(config, name), tuple):
        value = (value, value)
    return dataclasses.replace(config, **{group: value})


def cases(is_inside: bool) -> list[Any]:
    """On each bound that belongs to a field, or just outside of each."""
    found = []
    for config_type, name, bounds in NUMBERS:
        for sign, limit in bounds.limits.items():
            up = sign in (">=", ">")
            if bounds.is_whole:
                inside, outside = limit, limit + (-1 if up else 1)
            else:
                towards, away = (math.inf, -math.inf) if up else (-math.inf, math.inf)
                is_closed = sign in (">=", "<=")
                inside = float(limit) if is_closed else math.nextafter(limit, towards)
                outside = math.nextafter(limit, away) if is_closed else float(limit)
            number = inside if is_inside else outside
            found.append(pytest.param(config_type, name, number, id=f"{config_type.__name__}-{name}{sign}{limit}"))
    return found


def test_every_number_has_bounds() -> None:
    for config in (TrainConfig(), EvaluateConfig()):
        declared = {name.partition("[")[0] for name, _, _ in bounded(config)}
        numbers = {name for name, value in numbers_of(config) if not isinstance(value, bool)}
        assert numbers - declared == set()
    assert len(NUMBERS) > 40


def numbers_of(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += numbers_of(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float | tuple):
            found.append((prefix + field.name, value))
    return found


@pytest.mark.parametrize(("config_type", "name", "number"), cases(is_inside=True))
def test_a_number_on_its_bound_is_taken(config_type: type[Any], name: str, number: float) -> None:
    assert out_of_bounds(with_value(config_type(), name, number)) == []


@pytest.mark.parametrize(("config_type", "name", "number"), cases(is_inside=False))
def test_a_number_outside_of_its_bounds_is_named(config_type: type[Any], name: str, number: float) -> None:
    for message in out_of_bounds(with_value(config_type(), name, number)):
        assert message.startswith((f"{name} must be ", f"{name}[0] must be ", f"{name}[1] must be "))
        assert message.endswith(f", got {number}")
    assert out_of_bounds(with_value(config_type(), name, number))


@pytest.mark.parametrize(("config_type", "name"), [(config_type, name) for config_type, name, _ in NUMBERS])
def test_what_is_no_number_is_taken_nowhere(config_type: type[Any], name: str) -> None:
    assert out_of_bounds(with_value(config_type(), name, math.nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "seed": -1}, "steps must be >= 1, got 0; seed must be in 0 ... 2999, got -1"),
        ({"rollout.max_turns": 0}, "rollout.max_turns must be >= 1, got 0"),
        ({"adapter.alpha": math.inf}, "adapter.alpha must be > 0 and finite, got inf"),
        ({"rollout.temperature": 0.0}, "rollout.temperature must be > 0: a policy gradient needs samples, got 0.0"),
        ({"rollout.max_cache_gib": -1.0}, "rollout.max_cache_gib must be >= 0 (GiB), got -1.0"),
        ({"rollout.max_failed": 1.5}, "rollout.max_failed must be in [0, 1], got 1.5"),
        (
            {"learner.betas": 1.0},
            "learner.betas[0] must be in [0, 1), got 1.0; learner.betas[1] must be in [0, 1), got 1.0",
        ),
        ({"log.samples_mib": -1}, "log.samples_mib must be >= 0 (MiB), got -1"),
        ({"rollout.overlong_tokens": 17}, "rollout.overlong_tokens must be <= rollout.max_tokens=16, got 17"),
        ({"learner.updates_per_step": 17}, "learner.updates_per_step must be <= rollout.prompts_per_step=16, got 17"),
        ({"rollout.max_turns": 0, "rollout.overlong_tokens": 99, "rollout.group_size": 1}, None),
    ],
)
def test_all_faults_are_in_one_message(changes: dict[str, Any], message: str | None) -> None:
    config = TrainConfig()
    for name, value in changes.items():
        config = with_value(config, name, value)
    with pytest.raises(ValueError, match="must be ") as error:
        validate(config)
    if message is None:
        assert [part.partition(" ")[0] for part in str(error.value).split("; ")[:3]] == list(changes)
    else:
        assert str(error.value) == message


def test_the_defaults_can_be_meant() -> None:
    validate(TrainConfig())
    validate(SftConfig())
    assert out_of_bounds(EvaluateConfig()) == []


@pytest.mark.parametrize(
    ("hint", "rule", "words"),
    [
        (Annotated[int, Ge(1)], ">= 1", "at least 1"),
        (Annotated[int, Ge(1)] | None, ">= 1", "at least 1"),
        (list[Annotated[int, Le(3)]], "<= 3", "at most 3"),
        (Annotated[int, Ge(0), Le(9)], "in 0 ... 9", "0 to 9"),
        (Annotated[float, Ge(0), Le(1)], "in [0, 1]", "0 to 1"),
        (Annotated[float, Gt(0), Lt(1)], "in (0, 1)", "above 0 and below 1"),
        (Annotated[float, Gt(0), Lt(math.inf), Unit("s")], "> 0 and finite (s)", "above 0"),
        (Annotated[float, Gt(0), "because"], "> 0: because", "above 0"),
    ],
)
def test_bounds_in_messages_and_in_help(hint: Any, rule: str, words: str) -> None:
    bounds = bounds_of(hint)
    assert isinstance(bounds, Bounds)
    assert (bounds.rule, bounds.words) == (rule, words)


def test_settings_need_no_library_of_models() -> None:
    code = "import sys, rl_lora.config, rl_lora.settings.validation, rl_lora.settings.comparison\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "annotated_types" in loaded
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "pydantic", "yaml"} & set(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0, "n": 0}, "limit must be >= 1, got 0; n must be >= 1, got 0"),
        ({"n": 3}, "n must be 1 at temperature 0, got 3: greedy samples are all the same"),
        ({"k": [2]}, "k must be from 1 to n=1, the samples of a problem, got 2"),
        ({"temperature": math.inf}, "temperature must be >= 0 and finite, got inf"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
    ],
)
def test_an_evaluation_names_what_cannot_be_meant_and_lets_be_what_is_left_to_the_runs(
    changes: dict[str, Any], message: str
) -> None:
    validate_evaluation(EvaluateConfig())
    with pytest.raises(ValueError, match="must be ") as error:
        validate_evaluation(dataclasses.replace(EvaluateConfig(), **changes))
    assert str(error.value) == message
