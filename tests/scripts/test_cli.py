"""The commands as users meet them: options, YAML, and for bad input a message and an exit code before any work."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import rl_lora
from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.evaluation.candidates import adapter_folders, other_task
from rl_lora.scripts.cli import main
from rl_lora.scripts.command import parse, run
from rl_lora.settings.dotted import flatten
from rl_lora.trainer.trainer import train
from tests import ROOT
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import metrics, tiny_config


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Calls a subcommand with arguments, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str, name: str = "train") -> Result:
        monkeypatch.setattr(sys, "argv", ["rl-lora", *args])
        with pytest.raises(SystemExit) as exit:
            main(name)
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose configuration and tokenizer are fine, and whose weights cannot be loaded."""
    folder = tiny_folder(tmp_path_factory.mktemp("unloadable"), "llama")
    (folder / "model.safetensors").write_bytes(b"not weights")
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a run of one step."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(tiny_folder(folder, "llama"), folder / "run", steps=1)
    train(config)
    return config


def fields_of(config_type: type[Any]) -> list[str]:
    return list(flatten(config_type()))


def test_help_lists_every_option_with_its_explanation(command: Callable[..., Result]) -> None:
    result = command("--help", "all")
    assert result.code == 0
    assert "Train a LoRA adapter on a causal language model by policy gradient." in result.out
    for name in fields_of(TrainConfig):
        assert f"--{name} " in result.out, name
    text = " ".join(result.out.split())
    for explanation in ("Problems of a step, each sampled", "evaluation; 0 is greedy.", "AdamW betas"):
        assert explanation in text


def test_a_printed_config_read_again_is_the_same_config(command: Callable[..., Result], tmp_path: Path) -> None:
    given = ["--steps", "7", "--env.kwargs.digits", "[2, 3]", "--adapter.targets", "[q_proj,v_proj]"]
    result = command(*given, "--learner.learning_rate", "1e-5", "--model.stop_tokens", '["\\n"]', "--print_config")
    assert result.code == 0
    (tmp_path / "run.yaml").write_text(result.out)
    config = parse(TrainConfig, ["--config", "run.yaml"])
    assert (config.steps, config.env.kwargs, config.adapter.targets) == (7, {"digits": [2, 3]}, ["q_proj", "v_proj"])
    assert (config.learner.learning_rate, config.model.stop_tokens) == (1e-5, ["\n"])
    assert command("--config", "run.yaml", "--print_config").out == result.out


def test_the_defaults_of_the_command_are_those_of_the_dataclasses() -> None:
    assert parse(TrainConfig, []) == TrainConfig()


def test_the_config_that_a_run_wrote_starts_it_again(finished: TrainConfig) -> None:
    config = parse(TrainConfig, ["--config", str(Path(finished.run_dir) / "config.yaml")])
    assert config == finished


def test_options_go_over_the_yaml_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 3\nenv: {kwargs: {digits: 4, split: eval}}\nlearner: {objective: grpo}\n")
    config = parse(TrainConfig, ["--config", str(tmp_path / "a.yaml"), "--env.kwargs.digits", "3", "--seed", "2"])
    assert (config.steps, config.seed, config.learner.objective) == (3, 2, "grpo")
    assert config.env.kwargs == {"digits": 3, "split": "eval"}
    assert config.rollout == TrainConfig().rollout


@pytest.mark.parametrize(
    "text", ["Question: {question}", "Question: {question}\nAnswer:", "a: b: c", "- {answer}", "x:"]
)
def test_texts_with_a_colon_stay_texts(tmp_path: Path, text: str) -> None:
    recorded = tmp_path / "a.yaml"
    recorded.write_text(yaml.safe_dump({"steps": 3, "env": {"kwargs": {"template": text}}}))
    flow = yaml.safe_dump({"template": text}, default_flow_style=True)
    for args in (["--env.kwargs.template", text], ["--config", str(recorded)], ["--env.kwargs", flow]):
        assert parse(TrainConfig, args).env.kwargs == {"template": text}
    assert parse(TrainConfig, ["--rollout.system_prompt", text]).rollout.system_prompt == text
    assert parse(TrainConfig, ["--env.kwargs.reward", "{numeric: 1.0}"]).env.kwargs == {"reward": {"numeric": 1.0}}


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        ("--env.kwargs.digits 3", "env.kwargs", {"digits": 3}),
        ("--env.kwargs.digits 3 --env.kwargs.split eval", "env.kwargs", {"digits": 3, "split": "eval"}),
        ("--env.kwargs.reward my_rewards:ok", "env.kwargs", {"reward": "my_rewards:ok"}),
        ("--env.kwargs \"{digits: 3, operations: ['+', '-']}\"", "env.kwargs", {"digits": 3, "operations": ["+", "-"]}),
        ("--eval.env_kwargs.digits 3", "eval.env_kwargs", {"digits": 3}),
        ("--adapter.targets '[q_proj,v_proj]'", "adapter.targets", ["q_proj", "v_proj"]),
        ("--adapter.targets q_proj", "adapter.targets", "q_proj"),
        ("--log.trackers '[]'", "log.trackers", []),
        ("--learner.betas '[0.8, 0.9]'", "learner.betas", [0.8, 0.9]),
        ("--learner.learning_rate 1e-4", "learner.learning_rate", 1e-4),
        ("--resume true", "resume", True),
        ("--resume", "resume", True),
        ("--resume --steps 3", "resume", True),
        ("--resume false", "resume", False),
    ],
)
def test_an_option_sets_its_field_and_no_other(args: str, name: str, value: Any) -> None:
    found, default = flatten(parse(TrainConfig, shlex.split(args))), flatten(TrainConfig())
    assert found[name] == value
    changed = {other for other in found if found[other] != default[other]}
    assert changed <= {name, "steps"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--nope 3", "nope"),
        ("--env.idd x", "--env.idd may be meant for --env.id"),
        ("--learner.learing_rate 1", "--learner.learing_rate may be meant for --learner.learning_rate"),
        ("--adapter.rank x", "adapter.rank"),
        ("--learner.objective ppo", "learner.objective"),
        ("--config missing.yaml", "missing.yaml"),
    ],
)
def test_options_that_are_none_end_with_code_2(command: Callable[..., Result], args: str, message: str) -> None:
    result = command(*args.split())
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model.name ./nowhere", "model path './nowhere' does not exist"),
        ("--model.name 'no model'", "'no model' is no model: give 'smollm2-135m', a local folder, or a hub id"),
        ("--env.id rl_lora/Nope-v0", "unknown environment 'rl_lora/Nope-v0'"),
        ("--env.id rl_lora/Nope-v0", "rl_lora/Arithmetic-v0, rl_lora/Math-v0, rl_lora/Prompts-v0"),
        ("--env.id nomodule:Nope-v0", "environment 'nomodule:Nope-v0'"),
        ("--env.id CartPole-v1", "CartPole-v1 gives ndarray observations; a text environment gives str"),
        ("--env.kwargs.digit 3", "environment 'rl_lora/Arithmetic-v0' does not take {'digit': 3}"),
        ("--env.kwargs.digits 0", "digits must be a number from 1 to 18, or (low, high) of such, got 0"),
        ("--env.kwargs.digits null", "digits must be a number from 1 to 18, or (low, high) of such, got null"),
        ("--env.kwargs.reward nope", "no reward is called 'nope'; there are format, length, math, numeric"),
        ("--env.kwargs.reward nowhere:f", "reward 'nowhere:f': cannot import 'nowhere'"),
        ("--adapter.rank 0", "adapter.rank must be >= 1, got 0"),
        ("--adapter.targets '[q_prog]'", "no module matches 'q_prog'; linear layers here are down_proj, gate_proj, k_"),
        ("--adapter.init_from nowhere", "nowhere"),
        ("--learner.learning_rate -1e-3", "learner.learning_rate must be > 0 and finite, got -0.001"),
        ("--learner.learning_rate .nan", "learner.learning_rate must be > 0 and finite, got nan"),
        ("--rollout.group_size 1", "rollout.group_size must be >= 2, got 1: with the mean advantage"),
        ("--rollout.group_size 1 --learner.objective grpo", "with the standardized advantage a group of one has no"),
        ("--rollout.temperature 0", "rollout.temperature must be > 0: a policy gradient needs samples, got 0"),
        ("--learner.updates_per_step 17", "must be <= rollout.prompts_per_step=16, got 17"),
        ("--steps 0 --seed -1", "steps must be >= 1, got 0; seed must be in 0 ... 2999, got -1"),
        ("--rollout.max_tokens 500", "leaves 12 beside rollout.max_tokens=500; shorten the prompt or lower max_tokens"),
        (
            "--env.kwargs.template '{a} + {b} [/b] " + 500 * "x" + "'",
            "the prompt of rl_lora/Arithmetic-v0, seed 0, has",
        ),
        ("--model.stop_tokens '[\"[bold]\"]'", "stop token '[bold]' is 6 tokens of this model"),
        ("--log.trackers '[tensorbord]'", "unknown tracker 'tensorbord' in log.trackers; accelerate has "),
        ("--log.trackers '[swanlab]'", "tracker 'swanlab' in log.trackers is not installed"),
        ("--env.id rl_lora/Prompts-v0 --env.kwargs.path bad.jsonl", "bad.jsonl, line 3: not JSON"),
        ("--env.id rl_lora/Prompts-v0 --env.kwargs.path nowhere.jsonl", "nowhere.jsonl: No such file or directory"),
        ("--run_dir bad.jsonl", "bad.jsonl is a file; choose another --run_dir"),
        ("--run_dir bad.jsonl/run", "bad.jsonl is a file; choose another --run_dir"),
    ],
)
def test_bad_input_ends_with_its_message_before_any_weight_is_loaded_or_file_written(
    command: Callable[..., Result], unloadable: str, tmp_path: Path, args: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1 + 1", "answer": 2}\n\n{"prompt": "1 + 2", "answer": 3\n')
    result = command("--model.name", unloadable, *shlex.split(args))
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_model_that_cannot_be_loaded_is_found_last(command: Callable[..., Result], unloadable: str) -> None:
    result = command("--model.name", unloadable)
    assert result.code == 2
    assert f"error: cannot load the weights of model '{unloadable}'" in result.err
    assert not Path("runs/arithmetic/config.yaml").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(command: Callable[..., Result], finished: TrainConfig) -> None:
    recorded = str(Path(finished.run_dir) / "config.yaml")
    before = {path: path.stat().st_mtime_ns for path in Path(finished.run_dir).rglob("*")}
    result = command("--config", recorded)
    assert result.code == 2
    assert "already holds a run; continue it with --resume true, or choose another --run_dir" in result.err
    other = command("--config", recorded, "--resume", "--adapter.rank", "3", "--rollout.group_size", "4")
    assert other.code == 2
    assert "adapter.rank: 2 -> 3; rollout.group_size: 3 -> 4. Set these back" in other.err
    assert {path: path.stat().st_mtime_ns for path in Path(finished.run_dir).rglob("*")} == before
    alone = command("--run_dir", finished.run_dir, "--resume")
    assert (alone.code, f"(all its settings are --config {recorded} --resume true)" in alone.err) == (2, True)
    shown = command("--config", recorded, "--resume", "true")
    assert shown.code == 0
    assert "1 step in" in shown.out


def test_the_config_on_disk_counts_where_there_is_no_checkpoint_yet(
    command: Callable[..., Result], unloadable: str, tmp_path: Path
) -> None:
    config = dataclasses.asdict(parse(TrainConfig, ["--model.name", unloadable, "--env.kwargs.digits", "3"]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    result = command("--run_dir", "run", "--resume", "--model.name", unloadable)
    assert result.code == 2
    assert "env.kwargs: {'digits': 3} -> {}" in result.err
    assert "learner.betas" not in result.err
    fine = command("--run_dir", "run", "--resume", "--model.name", unloadable, "--env.kwargs.digits", "3")
    assert "cannot load the weights" in fine.err


def test_messages_are_printed_as_they_are_brackets_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    message = "no [bold]module[/] matches ['q_prog'] [/nope] [q_proj, v_proj] \\[x]"

    def fail() -> None:
        raise ValueError(message)

    assert run(fail) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_interrupted_run_says_how_to_go_on_and_ends_with_code_130(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rl_lora, "train", interrupted)
    result = command()
    assert result.code == 130
    assert "interrupted" in result.err
    assert result.err.strip().endswith("rl-lora train --resume true")


def test_what_is_no_mistake_of_the_user_keeps_its_traceback() -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(broken)


def test_the_next_command_that_a_run_names_repeats_its_evaluation(
    command: Callable[..., Result], finished: TrainConfig
) -> None:
    python, script, *args = shlex.split(json.loads((Path(finished.run_dir) / "summary.json").read_text())["next"])
    assert (Path(python).name, script) == ("python", "scripts/evaluate.py")
    result = command(*args, name="evaluate")
    assert result.code == 0, result.err
    base, trained = json.loads(Path("evaluation/results.json").read_text())["rows"]
    before, after = metrics(Path(finished.run_dir), "eval")
    for found, expected in ((base, before), (trained, after)):
        shared = expected.keys() - {"kind", "step", "seconds/evaluate"}
        assert {name: found[name] for name in shared} == {name: expected[name] for name in shared}
        assert "accuracy_low" in shared


def test_the_script_runs_from_any_folder_and_exits_with_its_code(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "train.py")]
    result = subprocess.run([*script, "--adapter.rank", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: adapter.rank must be >= 1, got 0\n"
    assert not list(tmp_path.iterdir())


def test_a_run_folder_stands_for_its_adapter_or_its_last_checkpoint_and_names_stay_apart(tmp_path: Path) -> None:
    done, going, elsewhere = tmp_path / "done", tmp_path / "going", tmp_path / "x" / "done"
    for folder in (done / "adapter", going / "checkpoints" / "step-000007" / "adapter", elsewhere):
        folder.mkdir(parents=True)
    assert adapter_folders([str(done), str(going), str(elsewhere)]) == {
        f"{tmp_path.name}/done": done / "adapter",
        "step-000007": going / "checkpoints" / "step-000007" / "adapter",
        "x/done": elsewhere,
    }


def test_an_evaluation_on_another_task_than_the_run_was_trained_on_is_said(finished: TrainConfig) -> None:
    folder = Path(finished.run_dir) / "adapter"
    config = EvaluateConfig(env=finished.env, max_tokens=finished.rollout.max_tokens)
    assert other_task(folder, config) == ""
    config.max_tokens += 1
    assert "max_tokens" in other_task(folder, config)
