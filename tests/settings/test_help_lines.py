"""Every setting of every command has a help line that stands alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.scripts.benchmarks.benchmark_accuracy import AccuracyConfig
from rl_lora.scripts.benchmarks.benchmark_evaluate import EvaluationBenchmarkConfig
from rl_lora.scripts.benchmarks.benchmark_neighbour import NeighbourBenchmarkConfig
from rl_lora.scripts.benchmarks.compare_lm_eval import CompareConfig
from rl_lora.scripts.benchmarks.compare_loaders import LoadersConfig
from rl_lora.scripts.benchmarks.compare_math_verify import CompareMathConfig
from rl_lora.scripts.cli import COMMANDS
from rl_lora.scripts.help import help_page, texts_of
from rl_lora.scripts.schema import Usage, schema_of

CONFIGS: list[type[Any]] = [
    *(command.config for command in COMMANDS.values()),
    AccuracyConfig,
    EvaluationBenchmarkConfig,
    NeighbourBenchmarkConfig,
    CompareConfig,
    LoadersConfig,
    CompareMathConfig,
]
OPTIONS = [
    pytest.param(texts_of(config_type()).get(name, ""), id=f"{config_type.__name__}-{name}")
    for config_type in CONFIGS
    for name in schema_of(config_type()).options
]


@pytest.mark.parametrize("text", OPTIONS)
def test_a_help_line_stands_alone(text: str) -> None:
    first = re.split(r"(?<=[.;:])\s", text)[0]
    assert len(first.split()) > 1, "a noun, and what it is for"
    assert text[0].isupper(), "a value such as `none` or 0 comes behind the name of what is set"
    assert re.search(r"[^.]\.$", text), "a sentence"
    assert not re.match(r"(Of|See|As|That|And|Any|Where|What) ", text), "it needs its neighbour"


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_group_and_command_says_what_it_is(config_type: type[Any]) -> None:
    assert (config_type.__doc__ or "").count(" ") > 3
    assert all(text.endswith(".") for text in schema_of(config_type()).groups.values())


def test_the_help_tells_bounds_and_defaults() -> None:
    def page(config: Any, topic: str) -> str:
        return " ".join(help_page(config, schema_of(config), Usage(), topic).split())

    assert "Training steps: a rollout or a batch of demonstrations each" in page(TrainConfig(), "steps")
    assert "(at least 1; default: 20)" in page(TrainConfig(), "steps")
    assert "--learner.betas [NUMBER ...] AdamW betas" in page(TrainConfig(), "betas")
    assert "(at least 0 and below 1; default: [0.9, 0.95])" in page(TrainConfig(), "betas")
    assert "--adapter.targets TEXT|[TEXT, ...] " in page(TrainConfig(), "targets")
    assert "(0 to 2999; default: 0)" in page(TrainConfig(), "seed")
    assert page(TrainConfig(), "max_cache_gib").endswith("By default half of the free memory. (at least 0)")
    assert "(at least 1; default: the run's, or 16)" in page(EvaluateConfig(), "max_tokens")
    assert page(EvaluateConfig(), "system_prompt").endswith("(default: the run's)")
    assert page(EvaluateConfig(), "model.dtype").endswith("(default: the run's, or auto)")
