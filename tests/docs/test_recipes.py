"""Every recipe is a run that its command accepts, and says what it is; the GSM8K one is run on a tiny model."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

import rl_lora.envs  # noqa: F401
from rl_lora.config import TrainConfig
from rl_lora.envs.math import PRESETS
from rl_lora.scripts.command import parse
from rl_lora.scripts.configs import SftConfig
from rl_lora.settings.validation import validate
from rl_lora.trainer.trainer import train
from tests import ROOT
from tests.envs.test_math_env import DATA
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import metrics

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS: dict[str, type[TrainConfig]] = {"train": TrainConfig, "sft": SftConfig}


def header(recipe: Path) -> str:
    return "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))


@functools.cache
def read(recipe: Path, *args: str) -> TrainConfig:
    """The config that the command named in a recipe's first line makes of it."""
    command = re.match(rf"# rl-lora (\w+) --config recipes/{re.escape(recipe.name)}\b", header(recipe))
    assert command, f"the first line of {recipe.name} must name its command"
    return parse(CONFIGS[command[1]], ["--config", str(recipe), *args])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_a_valid_run_of_its_command(recipe: Path) -> None:
    config = read(recipe)
    validate(config)
    assert config.run_dir == f"runs/{recipe.stem}"
    given = yaml.safe_load(recipe.read_text())
    assert set(given) >= {"steps", "model", "env", "rollout", "learner", "eval"}
    entry_point = gym.spec(config.env.id).entry_point
    assert isinstance(entry_point, str)
    module, _, name = entry_point.partition(":")
    environment = getattr(__import__(module, fromlist=[name]), name)
    inspect.signature(environment).bind(**config.env.kwargs)
    named = config.env.kwargs.get("dataset", [])
    assert set([named] if isinstance(named, str) else named) <= set(PRESETS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_what_it_is_what_to_expect_and_what_it_costs(recipe: Path) -> None:
    text = header(recipe)
    for entry in ("Model", "Data", "Expected", "Cost"):
        assert re.search(rf"^# {entry} +\S", text, re.MULTILINE), entry
    assert len(recipe.read_text().splitlines()) < 40


def test_the_recipes_are_named_in_the_documents() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert RECIPES
    assert [recipe.stem for recipe in RECIPES if f"`{recipe.stem}`" not in page] == []


def test_what_follows_demonstrations_starts_from_their_adapter() -> None:
    for recipe in RECIPES:
        if (start := read(recipe).adapter.init_from) is not None:
            before = ROOT / "recipes" / f"{Path(start).parts[1]}.yaml"
            assert read(before).learner.objective == "likelihood"
            assert read(before).env.kwargs == read(recipe).env.kwargs


@pytest.mark.parametrize("problems", ["written here", "real"])
def test_the_gsm8k_recipe_runs_from_end_to_end(problems: str, tmp_path: Path) -> None:
    """On a tiny model, which solves nothing: its own part is everything between the file and the summary."""
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    if problems == "real":
        files = [DATA / "gsm8k_train.jsonl", DATA / "gsm8k_test.jsonl"]
        if not all(file.exists() for file in files):
            pytest.skip(f"{files[0]} and {files[1].name} are not there (RL_LORA_DATA names another folder)")
    else:
        for start, file in enumerate(files):
            lines = [f'{{"question": "{i} and {start}?", "answer": "It is\\n#### {i + start}"}}\n' for i in range(12)]
            file.write_text("".join(lines))
    kwargs: dict[str, Any] = {"path": str(files[0]), "eval_path": str(files[1]), "limit": 12, "template": "{question}"}
    args = [f"--env.kwargs.{name}={value}" for name, value in kwargs.items()]
    model = ["--model.name", str(tiny_folder(tmp_path, "llama")), "--model.dtype", "float32"]
    changes = ["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--rollout.max_tokens", "16"]
    config = read(ROOT / "recipes" / "gsm8k-smoke.yaml", *args, *model, *changes)
    run_dir = train(config)
    assert [record["step"] for record in metrics(run_dir, "train")] == [1, 2, 3]
    for record in metrics(run_dir, "train"):
        assert record["tokens_learned"] > 0
        assert {"parts/math", "parts/math/answered", "parts/length", "parts/overlong"} <= record.keys()
    before, after = metrics(run_dir, "eval")
    for record in (before, after):
        assert record["episodes"] == 12
        assert 0 <= record["accuracy"] <= 1
        assert record["unscorable"] == 0


@pytest.mark.slow
def test_the_gsm8k_recipe_runs_on_the_default_model(tmp_path: Path) -> None:
    files = [DATA / f"gsm8k_{side}.jsonl" for side in ("train", "test")]
    if not all(file.exists() for file in files):
        pytest.skip(f"{files[0]} and {files[1].name} are not there (RL_LORA_DATA names another folder)")
    args = [f"--env.kwargs.path={files[0]}", f"--env.kwargs.eval_path={files[1]}", f"--run_dir={tmp_path / 'run'}"]
    run_dir = train(read(ROOT / "recipes" / "gsm8k-smoke.yaml", *args))
    records = metrics(run_dir, "train")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["unscorable"] == 0 for record in records)
    assert all(record["tokens_learned"] > 0 for record in records)
    assert all(record["sampler_learner_kl"] < 0.1 for record in records)
