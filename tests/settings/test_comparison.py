"""A resumed run may change what moves nothing of the adapter's path, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from rl_lora.config import AdapterConfig, EnvConfig, ModelConfig, TrainConfig
from rl_lora.settings.comparison import MAY_DIFFER, differences
from rl_lora.settings.dotted import as_typed, flatten
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL

CONFIG = TrainConfig(model=ModelConfig(name="/home/someone/m"), adapter=AdapterConfig(init_from="/home/someone/a"))
SETTINGS = flatten(CONFIG)


def test_what_may_differ_is_a_setting_or_a_group_of_settings() -> None:
    assert {*SETTINGS, *(name.partition(".")[0] for name in SETTINGS)} >= MAY_DIFFER
    assert differences(CONFIG, SETTINGS) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_is_named_with_both_values_unless_it_may_differ(name: str) -> None:
    found = differences(CONFIG, SETTINGS | {name: "another"})
    if {name, name.partition(".")[0]} & MAY_DIFFER:
        assert found == []
    else:
        assert found == [f"{name}: another -> {as_typed(SETTINGS[name])}"]


@pytest.mark.parametrize(
    "record",
    [
        {name: value for name, value in SETTINGS.items() if name != "rollout.max_replaced"},
        SETTINGS | {"learner.betas": (0.9, 0.95)},
        SETTINGS | {"env.id": "envs:rl_lora/Arithmetic-v0"},
        SETTINGS | {"model.name": "~/m", "adapter.init_from": "~/a"},
    ],
    ids=["a setting is new", "a tuple is a list", "our own environments had a module", "a tilde was written down"],
)
def test_what_an_older_version_wrote_down_is_the_same(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert differences(CONFIG, record) == []


def test_the_default_model_of_an_older_record_is_the_embedded_one() -> None:
    config = TrainConfig(model=ModelConfig(name=EMBEDDED_MODEL))
    assert differences(config, flatten(config) | {"model.name": DEFAULT_MODEL}) == []


def test_a_setting_of_another_version_is_named() -> None:
    assert differences(CONFIG, SETTINGS | {"rollout.gone": 3}) == ["rollout.gone: 3 -> no such option in this version"]


def test_a_task_that_changed_is_named_as_it_is_typed() -> None:
    config = TrainConfig(env=EnvConfig(kwargs={"digits": [1, 2], "x": None}))
    (difference,) = differences(config, flatten(TrainConfig()) | {"model.name": EMBEDDED_MODEL, "env.kwargs": {}})[:1]
    assert difference == "env.kwargs: {} -> {'digits': [1, 2], 'x': null}"
