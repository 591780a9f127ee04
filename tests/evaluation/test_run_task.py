"""An evaluation takes the task of its adapters' runs, as far as they agree and nothing else is said."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import rl_lora.envs  # noqa: F401
from rl_lora import EvaluateConfig, Policy, evaluate, save_adapter, train
from rl_lora.config import EnvConfig, EpisodeConfig, ModelConfig, RolloutConfig, TrainConfig, model_of_run
from rl_lora.evaluation.run_task import resolve_task
from rl_lora.report.next_command import next_command
from rl_lora.scripts.options import parse
from rl_lora.settings.dotted import flatten
from rl_lora.settings.from_run import OF_RUN, without_run
from rl_lora.trainer.run_log import tracker_kwargs
from tests import ROOT
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a run of one step, on a task that is not the default."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(tiny_folder(folder, "llama"), folder / "run", steps=1)
    config.env = EnvConfig("rl_lora/Arithmetic-v0", {"digits": 1})
    config.rollout.max_tokens, config.rollout.system_prompt, config.rollout.max_turns = 5, "# Reply briefly.", 2
    config.model.stop_tokens = ["7"]
    config.eval.episodes = 4
    train(config)
    return config


def other_run(run: TrainConfig, folder: Path, **changes: Any) -> str:
    """A run folder with the same adapter, whose config.yaml says something else."""
    there = Path(run.run_dir)
    (folder / "adapter").mkdir(parents=True)
    for file in (there / "adapter").iterdir():
        (folder / "adapter" / file.name).write_bytes(file.read_bytes())
    (folder / "metrics.jsonl").write_bytes((there / "metrics.jsonl").read_bytes())
    config = yaml.safe_load((there / "config.yaml").read_text(encoding="utf-8"))
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(folder)


def settings(*args: str) -> EvaluateConfig:
    config = parse(EvaluateConfig, list(args))
    return resolve_task(config, config.adapters).settings


@pytest.mark.parametrize("part", ["", "adapter", "checkpoints/step-000001", "checkpoints/step-000001/adapter"])
def test_what_is_not_said_is_the_runs(run: TrainConfig, part: str) -> None:
    found, trained = flatten(settings("--adapters", str(Path(run.run_dir) / part))), flatten(run)
    assert {name: found[name] for name in OF_RUN} == {name: trained[place] for name, place in OF_RUN.items()}
    assert found["model.stop_tokens"] == ["7"]
    assert (found["limit"], found["temperature"], found["model.trust_remote_code"]) == (256, 0.0, False)


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ("--max_tokens 16", {"max_tokens": 16}),
        ("--system_prompt ''", {"system_prompt": None}),
        ("--model.dtype auto --model.stop_tokens", {"model.dtype": "auto", "model.stop_tokens": []}),
        ("--env.kwargs.operations '[+]'", {"env.kwargs": {"digits": 1, "operations": ["+"]}}),
        ("--env.kwargs.digits 2", {"env.kwargs": {"digits": 2}}),
        ("--env.id rl_lora/Arithmetic-v0", {"env.kwargs": {}}),
        ("--env.id A --env.kwargs.x 1", {"env.id": "A", "env.kwargs": {"x": 1}}),
    ],
)
def test_what_is_said_wins_also_where_it_is_the_default(run: TrainConfig, args: str, changed: dict[str, Any]) -> None:
    plain = flatten(settings("--adapters", run.run_dir))
    assert flatten(settings("--adapters", run.run_dir, *shlex.split(args))) == plain | changed


def test_in_python_too_what_is_given_wins_and_the_rest_is_the_runs(run: TrainConfig) -> None:
    config = EvaluateConfig(adapters=[run.run_dir], model=ModelConfig(name=run.model.name), max_tokens=16)
    found = resolve_task(config, config.adapters).settings
    assert (found.model.stop_tokens, found.max_tokens, found.env) == ([], 16, run.env)


def test_runs_that_disagree_are_named_with_what_to_say(run: TrainConfig, tmp_path: Path) -> None:
    other = other_run(run, tmp_path / "b", env__kwargs={"digits": 2}, rollout__max_tokens=9)
    with pytest.raises(ValueError, match="the runs differ in what they were trained on") as error:
        settings("--adapters", run.run_dir, other)
    for text in (
        "env.kwargs: {'digits': 1} in ",
        "{'digits': 2} in ",
        "max_tokens: 5 in ",
        "--env.kwargs ... --max_tokens",
    ):
        assert text in str(error.value)
    chosen = settings("--adapters", run.run_dir, other, "--env.id", "A", "--max_tokens", "3")
    assert (chosen.env, chosen.max_tokens, chosen.system_prompt) == (EnvConfig("A", {}), 3, "# Reply briefly.")


def test_runs_that_differ_in_something_else_agree(run: TrainConfig, tmp_path: Path) -> None:
    other = other_run(run, tmp_path / "b", adapter__rank=4, learner__learning_rate=1.0)
    assert settings("--adapters", run.run_dir, other).env == run.env


def test_adapters_without_a_run_do_not_count_but_for_their_base(run: TrainConfig, tmp_path: Path) -> None:
    policy = Policy.load(run.model.name, dtype="float32")
    foreign = str(save_adapter(policy.bank.add("a"), tmp_path / "foreign", run.model.name))
    (tmp_path / "config.yaml").write_text("steps: 3\n", encoding="utf-8")
    found = settings("--adapters", foreign)
    assert flatten(found) == flatten(settings()) | {"model.name": run.model.name, "adapters": [foreign]}
    assert settings("--adapters", foreign, run.run_dir).env == run.env
    assert settings("--adapters", foreign, "--model.name", "x").model.name == "x"


def test_without_adapters_the_defaults_hold() -> None:
    found = settings()
    assert (found.model, found.env) == (ModelConfig(), EnvConfig())
    assert flatten(found) == flatten(EvaluateConfig()) | without_run()
    for field in dataclasses.fields(EpisodeConfig):
        assert getattr(found, field.name) == getattr(RolloutConfig(), field.name)


def test_a_part_of_the_base_may_be_given_in_python(run: TrainConfig) -> None:
    config = EvaluateConfig([run.run_dir], model=model_of_run(stop_tokens=["8"]))
    found = resolve_task(config, config.adapters).settings
    assert (found.model.name, found.model.stop_tokens, found.max_tokens) == (run.model.name, ["8"], 5)


def test_the_header_says_whose_task_it_is(
    run: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(run.run_dir).parent)
    results = evaluate(EvaluateConfig(adapters=["run"], limit=3, out=str(tmp_path / "out")))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("task  rl_lora/Arithmetic-v0 {'digits': 1}, max_tokens 5, ")
    assert line.endswith(": the task of run")
    assert results["config"]["env"] == {"id": "rl_lora/Arithmetic-v0", "kwargs": {"digits": 1}}


def test_the_next_command_is_short_and_starts_where_it_is_printed(
    run: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    summary = json.loads((Path(run.run_dir) / "summary.json").read_text(encoding="utf-8"))
    adapter = str(Path(run.run_dir) / "adapter")
    assert shlex.split(summary["next"])[2:] == ["--adapters", adapter, "--limit", "4", *max_rows(run)]
    monkeypatch.chdir(tmp_path)
    python, script, *_ = shlex.split(next_command(run, adapter))
    assert Path(script) == ROOT / "scripts" / "evaluate.py"
    assert Path(python).is_absolute() or Path(python).name == python
    monkeypatch.chdir(ROOT)
    assert shlex.split(next_command(run, adapter))[1] == "scripts/evaluate.py"


def max_rows(run: TrainConfig) -> list[str]:
    return [] if run.rollout.max_rows == 256 else ["--max_rows", str(run.rollout.max_rows)]


@pytest.mark.parametrize("config_type", [TrainConfig, EvaluateConfig])
def test_a_tilde_is_the_home_in_options_in_files_and_in_python(
    config_type: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    name = "run_dir" if config_type is TrainConfig else "out"
    file = tmp_path / "a.yaml"
    file.write_text(f"{name}: ~/x\nmodel: {{name: ~/m}}\n", encoding="utf-8")
    for config in (
        parse(config_type, [f"--{name}=~/x", "--model.name=~/m"]),
        parse(config_type, ["--config", str(file)]),
        config_type(**{name: "~/x"}, model=ModelConfig(name="~/m")),
    ):
        assert (getattr(config, name), config.model.name) == ("/home/someone/x", "/home/someone/m")
    assert parse(TrainConfig, ["--adapter.init_from", "~/a"]).adapter.init_from == "/home/someone/a"
    assert parse(EvaluateConfig, ["--adapters", "~/a", "b"]).adapters == ["/home/someone/a", "b"]


def test_trackers_are_told_the_name_of_the_run() -> None:
    assert tracker_kwargs("seed0")["wandb"] == {"name": "seed0"}
    assert all(list(kwargs.values()) == ["seed0"] for kwargs in tracker_kwargs("seed0").values())
