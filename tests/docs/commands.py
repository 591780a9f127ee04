"""The commands that README and docs show, in this process: read by their own parsers, and run on a tiny model."""

from __future__ import annotations

import configparser
import contextlib
import glob
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.scripts.benchmarks import (
    benchmark_accuracy,
    benchmark_evaluate,
    benchmark_neighbour,
    benchmark_rewards,
    compare_lm_eval,
    compare_loaders,
    compare_math_verify,
)
from rl_lora.scripts.cli import COMMANDS
from rl_lora.scripts.completion import script_for
from rl_lora.scripts.options import parse
from rl_lora.scripts.schema import Usage
from rl_lora.settings.validation import validate
from tests.docs.pages import ROOT

CONFIGS: dict[str, type[Any]] = {
    **{name: command.config for name, command in COMMANDS.items()},
    "benchmark_accuracy": benchmark_accuracy.AccuracyConfig,
    "benchmark_evaluate": benchmark_evaluate.EvaluationBenchmarkConfig,
    "benchmark_neighbour": benchmark_neighbour.NeighbourBenchmarkConfig,
    "compare_lm_eval": compare_lm_eval.CompareConfig,
    "compare_loaders": compare_loaders.LoadersConfig,
    "compare_math_verify": compare_math_verify.CompareMathConfig,
}
"""Commands and scripts whose options are a config; `benchmark_rewards` and `imports` have others."""
SCRIPT = re.compile(r"scripts/(?:benchmarks/)?(\w+)\.py")


def command_in(words: list[str]) -> tuple[str, list[str]] | None:
    """The project's command among the words of a shell command, and its arguments; None where there is none."""
    for i, word in enumerate(words):
        if (word.rpartition("/")[2] == "rl-lora" or words[i - 1 : i + 1] == ["-m", "rl_lora"]) and i + 1 < len(words):
            return words[i + 1], words[i + 2 :]
        if word == "rl_lora" and words[i - 1] == "-m":
            return words[i + 1], words[i + 2 :]
        if match := SCRIPT.fullmatch(word):
            assert (ROOT / word).is_file(), f"there is no {word}"
            return match[1], words[i + 1 :]
    return None


def check(words: list[str]) -> None:
    """Raise what the command's own parser says of a shell command; AssertionError where it is none that is known."""
    if (found := command_in(words)) is not None:
        if found[0] in CONFIGS:
            read(*found)
        else:
            assert found[0] in ("benchmark_rewards", "imports"), f"there is no command {found[0]}"
        return
    program, *rest = words
    if program == "make":
        check_target(next(word for word in rest if "=" not in word))
    elif program == "pip":
        extras = configparser.ConfigParser()
        extras.read(ROOT / "setup.cfg", encoding="utf-8")
        for word in rest:
            for name in re.findall(r"^\.\[(.*)\]$", word):
                assert name in extras["options.extras_require"], f"there is no extra {name}"
        assert all((ROOT / word).exists() for word in rest if word.endswith((".txt", ".cfg")))
    elif program == "eval":
        [*command, shell] = rest[0].removeprefix("$(").removesuffix(")").split()
        assert command == ["rl-lora", "completion"]
        assert "rl-lora" in script_for([shell])
    else:
        assert words == [".", ".venv/bin/activate"], f"no test knows the command {program}: say why it is not run"


def read(name: str, args: list[str]) -> Any:
    """The config that a command makes of its arguments, judged as far as that needs no model."""
    usage = COMMANDS[name].usage if name in COMMANDS else Usage()
    config = parse(CONFIGS[name], [arg for arg in args if arg != "--print_config"], usage)
    if isinstance(config, TrainConfig):
        validate(config)
    return config


def check_target(target: str) -> None:
    """A target of the Makefile, and every command of the project that it would run."""
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    for line in re.split(r"\n|;|\|\||&&", dry.stdout.replace("\\\n", " ")):
        words = [re.sub(r"\$\w+", "0", word) for word in split_quoted(line)]
        if (found := command_in(words)) is not None and found[0] in CONFIGS:
            read(*found)


def split_quoted(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # half of a quoted text: no command of the project's
        return []


def run(words: list[str], tiny: Path, data: Path) -> None:
    """Do what a command does, on a tiny model, in few small steps, without the network."""
    words, out = redirected(words)
    check(words)
    found = command_in(words)
    if found is None:
        return
    name, args = found
    args = [path for arg in args for path in (sorted(glob.glob(arg)) if "*" in arg else []) or [arg]]
    with contextlib.ExitStack() as stack:
        if out is not None:
            file = stack.enter_context(open(out, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        if "--print_config" in args:
            with pytest.raises(SystemExit):
                parse(CONFIGS[name], args)
        elif name in CONFIGS:
            work = COMMANDS[name].load() if name in COMMANDS else compare_loaders.run
            work(small(read(name, args), tiny, data))
        elif name == "imports":
            subprocess.run([sys.executable, ROOT / "scripts" / "imports.py", *args], check=True, capture_output=True)
        else:
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(sys, "argv", [name, *args, "--model", str(tiny)])
            benchmark_rewards.main()


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    return (words[:-2], words[-1]) if len(words) > 2 and words[-2] == ">" else (words, None)


def small(config: Any, tiny: Path, data: Path) -> Any:
    """A config with the same options on a tiny model, and with less of everything that takes time."""
    if hasattr(config, "model"):
        config.model.name, config.model.dtype = str(tiny), "float32"
        if config.model.stop_tokens:
            config.model.stop_tokens = ["\n"]  # one token of the tiny model
    if isinstance(config, TrainConfig):
        rollout = config.rollout
        rollout.group_size, rollout.prompts_per_step = min(2, rollout.group_size), min(2, rollout.prompts_per_step)
        rollout.max_tokens, config.steps = min(4, rollout.max_tokens), min(2, config.steps)
        config.eval.episodes, config.checkpoint.every, config.log.trackers = min(2, config.eval.episodes), 1, []
    if isinstance(config, EvaluateConfig):
        config.n, config.k = min(2, config.n), []
    if hasattr(config, "limit"):
        config.limit, config.max_tokens = 2, 4
    if getattr(config, "env", None) and (config.env.kwargs or {}).get("dataset") == "gsm8k":
        config.env.kwargs |= {"path": str(data), "eval_path": str(data), "overlap": "allow"}
    return config
