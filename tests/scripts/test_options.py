"""Options of the command line, on the configs of all commands: defaults, texts, lists, mappings, files, and misuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rl_lora
import rl_lora.scripts.benchmarks.benchmark_evaluate
import rl_lora.scripts.benchmarks.benchmark_neighbour
import rl_lora.scripts.benchmarks.compare_lm_eval
from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.scripts.cli import main
from rl_lora.scripts.configs import BenchmarkConfig, PlotConfig, ReportConfig, SftConfig
from rl_lora.scripts.options import parse
from rl_lora.scripts.schema import options_of
from rl_lora.scripts.values import is_list
from rl_lora.settings.dotted import flatten
from rl_lora.system.plain_yaml import dump
from tests import ROOT

CONFIGS: list[type[Any]] = [
    TrainConfig,
    SftConfig,
    EvaluateConfig,
    ReportConfig,
    PlotConfig,
    BenchmarkConfig,
    rl_lora.scripts.benchmarks.benchmark_evaluate.EvaluationBenchmarkConfig,
    rl_lora.scripts.benchmarks.benchmark_neighbour.NeighbourBenchmarkConfig,
    rl_lora.scripts.benchmarks.compare_lm_eval.CompareConfig,
]
TEXTS = [
    "# Rules: reply with a number only",
    "#### {answer}",
    "&name x",
    "*alias",
    "!tag x",
    "%x",
    "@x",
    "`x`",
    "| x",
    ">",
    " x ",
    "x\n",
    "\nx\n\n",
    "a # b",
    "- x",
    "-x",
    "a: b",
    "x:",
    "{question}",
    "{question} # {answer}",
    "{a}: {b}",
    "[INST] {question} [/INST]",
    '"quoted"',
    "it's",
    "'",
    '"',
    "<<",
    "=",
    "?",
    "2024-01-01",
    "12:30",
    "~",
    "Null",
    "None",
    "",
    "\t",
    "ü – ∑ 日本",
]
TYPED = ["null", "yes", "true", "3", "1e3", "0x10", ".5", "[a]", "{a: b}"]
"""Inside of a mapping these are no texts, unless in quotes."""


def printed(config_type: type[Any], args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(config_type, [*args, "--print_config"])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config_type", CONFIGS)
def test_a_bare_command_has_its_dataclass_defaults(config_type: type[Any]) -> None:
    assert parse(config_type, []) == config_type()


def test_a_bare_benchmark_has_something_to_measure() -> None:
    config = parse(BenchmarkConfig, [])
    assert config.rollouts
    assert config.steps


@pytest.mark.parametrize("config_type", CONFIGS)
def test_options_replace_the_defaults_of_lists_and_none_gives_an_empty_list(
    config_type: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {name: option for name, option in options_of(config_type()) if is_list(option.hint)}
    for name, option in lists.items():
        if option.hint == tuple[float, float]:
            continue
        items: list[Any] = [7, 8] if int in get_args(option.hint) else ["x", "#y"]
        for found in (
            parse(config_type, [f"--{name}", *map(str, items)]),
            parse(config_type, ["--config", written(tmp_path, name, items)]),
        ):
            assert flatten(found) == flatten(config_type()) | {name: items}
        assert flatten(parse(config_type, [f"--{name}"]))[name] == []
        assert flatten(parse(config_type, ["--config", written(tmp_path, name, [])]))[name] == []
        shown = printed(config_type, [f"--{name}", *map(str, items)], capsys)
        assert flatten_plain(yaml.safe_load(shown))[name] == items


def written(folder: Path, name: str, value: Any) -> str:
    """A YAML file that sets one option."""
    for part in reversed(name.split(".")):
        value = {part: value}
    (folder / "one.yaml").write_text(dump(value), encoding="utf-8")
    return str(folder / "one.yaml")


def flatten_plain(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flatten_plain(item, f"{prefix}.{key}".strip(".")).items()}


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        ("--log.trackers tensorboard wandb", "log.trackers", ["tensorboard", "wandb"]),
        ("--log.trackers '[tensorboard, wandb]'", "log.trackers", ["tensorboard", "wandb"]),
        ("--log.trackers=wandb", "log.trackers", ["wandb"]),
        ("--model.stop_tokens '# End'", "model.stop_tokens", ["# End"]),
        ("--model.stop_tokens '[\"# End\", yes]'", "model.stop_tokens", ["# End", "yes"]),
        ("--learner.betas 0.8 0.9", "learner.betas", [0.8, 0.9]),
        ("--learner.betas 0.8,0.9", "learner.betas", [0.8, 0.9]),
        ("--env.kwargs.a.b 3 --env.kwargs.a.c x", "env.kwargs", {"a": {"b": 3, "c": "x"}}),
        ("--env '{id: A, kwargs: {b: c}}'", "env.kwargs", {"b": "c"}),
        ("--env.kwargs '{a: 1}' --env.kwargs.b 2", "env.kwargs", {"a": 1, "b": 2}),
        ("--env.kwargs.b 2 --env.kwargs '{a: 1}'", "env.kwargs", {"a": 1}),
        ("--env.kwargs '{template: \"# {x}\", path: x.jsonl}'", "env.kwargs", {"template": "# {x}", "path": "x.jsonl"}),
        ("--rollout.system_prompt null", "rollout.system_prompt", None),
        ("--model.compile", "model.compile", True),
        ("--model.compile null", "model.compile", None),
    ],
)
def test_lists_and_mappings_are_typed_in_several_ways(args: str, name: str, value: Any) -> None:
    assert flatten(parse(TrainConfig, shlex.split(args)))[name] == value


@pytest.mark.parametrize("text", TEXTS + TYPED)
def test_a_text_stays_the_text_that_was_typed(text: str, tmp_path: Path) -> None:
    if text != "null":
        for args in (["--rollout.system_prompt", text], [f"--rollout.system_prompt={text}"]):
            assert parse(TrainConfig, args).rollout.system_prompt == text
    assert parse(EvaluateConfig, ["--against", "x", "--adapters", "a", text]).adapters[1] in (text, str(Path.home()))
    file = written(tmp_path, "rollout.system_prompt", text)
    assert parse(TrainConfig, ["--config", file]).rollout.system_prompt == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_inside_of_a_mapping_stays_the_text_that_was_typed(text: str, tmp_path: Path) -> None:
    flow = yaml.safe_dump({"template": text}, default_flow_style=True, width=10**6, allow_unicode=True)
    for args in (
        ["--env.kwargs.template", text],
        [f"--env.kwargs.template={text}"],
        ["--env.kwargs", flow.strip()],
        ["--config", written(tmp_path, "env.kwargs.template", text)],
    ):
        assert parse(TrainConfig, args).env.kwargs == {"template": text}


@pytest.mark.parametrize("text", TYPED)
def test_what_is_no_text_inside_of_a_mapping_is_one_in_quotes(text: str) -> None:
    assert not isinstance(parse(TrainConfig, ["--model.template_kwargs.x", text]).model.template_kwargs["x"], str)
    for quoted in (f'"{text}"', f"'{text}'"):
        assert parse(TrainConfig, ["--model.template_kwargs.x", quoted]).model.template_kwargs == {"x": text}


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
@example("#")
@example("-\n#")
@example("{x: y} # z")
def test_any_text_that_is_typed_is_kept_or_refused_and_read_back_from_the_printed_config(text: str) -> None:
    if text != "null":
        assert parse(TrainConfig, [f"--rollout.system_prompt={text}"]).rollout.system_prompt == text
    try:
        value = parse(TrainConfig, [f"--env.kwargs.x={text}"]).env.kwargs["x"]
    except ValueError:
        return
    if isinstance(value, str):
        assert value in (text, text[1:-1])
        assert value == text or text[0] == text[-1] in ("'", '"')


def test_a_config_of_any_text_is_printed_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = {f"k{i}": text for i, text in enumerate([*TEXTS, *TYPED, "\x1b[31m", "\udcff"])}
    config = TrainConfig()
    config.env.kwargs, config.rollout.system_prompt = kwargs, "# yes"
    (tmp_path / "a.yaml").write_text(dump(dataclasses.asdict(config)), encoding="utf-8")
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["env"]["kwargs"] == kwargs
    assert parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")]) == config
    (tmp_path / "b.yaml").write_text(printed(TrainConfig, ["--config", str(tmp_path / "a.yaml")], capsys))
    assert parse(TrainConfig, ["--config", str(tmp_path / "b.yaml")]) == config


def test_a_text_in_a_file_needs_no_quotes_and_what_is_a_comment_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "run_dir: 2024-01-01\nrollout:\n  system_prompt: yes\nadapter: {targets: [1e3]}\n"
        "env: # the task\n  kwargs:\n    template: #### {answer}\n",
        encoding="utf-8",
    )
    config = parse(TrainConfig, ["--config", str(file)])
    assert (config.run_dir, config.rollout.system_prompt, config.adapter.targets) == ("2024-01-01", "yes", ["1e3"])
    assert capsys.readouterr().err == f"{file}, line 7: the value is empty: '#### {{answer}}' is a comment in YAML\n"


def test_options_go_over_files_wherever_they_stand_and_later_files_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 3\nseed: 4\n")
    (tmp_path / "b.yaml").write_text("seed: 5\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse(TrainConfig, ["--steps", "9", *files])
    assert (config.steps, config.seed) == (9, 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--steps x", "steps must be a whole number, got 'x'"),
        ("--steps null", "steps must be a whole number, got 'null'"),
        ("--resume maybe", "resume must be true or false, got 'maybe'"),
        ("--rollout.max_cache_gib much", "rollout.max_cache_gib must be a number or null, got 'much'"),
        ("--model.dtype float16", "model.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("--learner.betas 0.9", "learner.betas must be a list such as [0.5, 0.5], got ['0.9']"),
        ("--steps", "--steps needs a value; one that begins with -- is written --steps=..."),
        ("--run_dir --steps 3", "--run_dir needs a value"),
        ("--env.kwargs x", "env.kwargs must be a mapping such as {name: value}, got 'x'"),
        ("--env.kwargs '{a: b'", "env.kwargs is no YAML, line 1, column 6"),
        ("--env.kwargs {a: b}", "'b}' belongs to no option; a value with spaces in it is put in quotes"),
        ("--env.kwargs '{a: b # c}'", "behind # YAML reads nothing: put such a text in quotes"),
        ("--env.kwargs '{a: &b c}'", "has a text that begins with &, * or !: put it in quotes"),
        ("--env '{id: a # b}'", "env is no YAML, line 1, column"),
        ("--env '{idd: a}'", "there is no option env.idd; env.idd may be meant for env.id"),
        ("--env '{id: a, kwargs: b}'", "env.kwargs must be a mapping such as {name: value}, got 'b'"),
        ("--env.kwargs '{a: 1, a: 2}'", "a is given twice"),
        ("--env.kwargs.x '{a: 1, #b\n c: 2}'", "env.kwargs.x has a comment, which YAML leaves out"),
        ("--env.kwargs.a 1 --env.kwargs.a.b 2", "env.kwargs.a.b cannot be set: a is 1, no mapping"),
        ("--max_tokens 3", "--max_tokens may be meant for --rollout.max_tokens"),
        ("--run-dir x", "--run-dir may be meant for --run_dir"),
        ("--lr 1e-4", "--lr may be meant for --learner.learning_rate"),
        ("--learner.lr 1e-4", "--learner.lr may be meant for --learner.learning_rate"),
        ("--adapter.learning_rate 1", "--adapter.learning_rate may be meant for --learner.learning_rate"),
        ("--batch-size 8", "--batch-size may be meant for --rollout.prompts_per_step"),
        ("--rnak 8", "--rnak may be meant for --adapter.rank"),
        ("--lerner.rank 8", "--lerner.rank may be meant for --adapter.rank"),
        ("--logg x", "there is no option --logg; --help all"),
        ("--config group.yaml", "line 1: there is no option lerner; lerner may be meant for learner"),
        ("steps 3", "options have two dashes: --steps"),
        ("-steps 3", "options have two dashes: --steps"),
        ("--config no.yaml", "cannot read config file no.yaml: No such file or directory"),
        ("--config .", "cannot read config file .: Is a directory"),
        ("--config latin.yaml", "config file latin.yaml is not UTF-8: byte 0xfc at 14"),
        ("--config no_yaml.yaml", "config file no_yaml.yaml is not YAML: line 2, column"),
        ("--config list.yaml", "config file list.yaml: it must hold options such as `steps: 20`"),
        (
            "--config typo.yaml",
            "config file typo.yaml: line 2: there is no option env.idd; env.idd may be meant for env.id",
        ),
        ("--config type.yaml", "config file type.yaml: line 1: steps must be a whole number, got 'x'"),
        ("--config twice.yaml", "config file twice.yaml: line 2: steps is given twice"),
    ],
)
def test_misuse_is_one_line(args: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "group": "lerner: {}\n",
        "no_yaml": "a: [\nb: ]]",
        "list": "- a\n",
        "typo": "env:\n  idd: x\n",
        "type": "steps: x\n",
    }
    for name, text in (files | {"twice": "steps: 1\nsteps: 2\n"}).items():
        Path(f"{name}.yaml").write_text(text)
    Path("latin.yaml").write_bytes("run_dir: runs/ü\n".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(TrainConfig, shlex.split(args))
    assert len(str(error.value).splitlines()) == 1


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "ü.yaml").write_bytes("\ufeffrun_dir: runs/ü\n".encode())
    assert parse(TrainConfig, ["--config", str(tmp_path / "ü.yaml")]).run_dir == "runs/ü"


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_command_tells_its_version(config_type: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(config_type, ["--version"])
    assert exit.value.code == 0
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"\nversion = {rl_lora.__version__}\n" in setup
    assert capsys.readouterr().out == f"rl_lora {rl_lora.__version__}\n"


def test_a_page_is_written_elsewhere_where_its_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = {"kind": "train", "step": 1, "reward": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (run / "config.yaml").write_text("steps: 1\nenv: {id: Task-v0}\nmodel: {name: tiny}\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["rl-lora", str(run), "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as exit:
        main("report")
    assert exit.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl"]
    monkeypatch.setattr("sys.argv", ["rl-lora", str(run), "--out", str(tmp_path / "no" / "page.html")])
    with pytest.raises(SystemExit) as exit:
        main("report")
    assert exit.value.code == 1
    assert "--out FILE writes the page elsewhere" in capsys.readouterr().err


def test_what_users_write_beside_the_project_is_not_judged(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("my_rewards.py", "runs/own.py", "rl_lora/ours.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import os\nx = lambda: 1\n", encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    found = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    judged = {line.partition(":")[0] for line in found.stdout.splitlines() if line.count(":") > 2}
    assert judged == {"rl_lora/ours.py"}
