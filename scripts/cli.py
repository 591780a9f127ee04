"""The command `rl-lora` and its subcommands. The scripts beside this file and `python -m rl_lora` enter here too.

Options are read and judged before the libraries that take seconds to import.
"""

from __future__ import annotations

import rl_lora.scripts.signals as signals  # first: Ctrl-C while the rest is imported

# isort: split
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import rl_lora
from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.scripts.command import USER_ERROR, run
from rl_lora.scripts.configs import BenchmarkConfig, PlotConfig, ReportConfig, SftConfig
from rl_lora.scripts.options import parse
from rl_lora.scripts.schema import Usage, meant, nearest
from rl_lora.settings.validation import validate, validate_bounds, validate_evaluation
from rl_lora.system.invocation import COMMAND, launcher, words
from rl_lora.system.terminal import guard, say
from rl_lora.trainer.taken import refuse_taken_early

Work = Callable[[Any], object]


@dataclass(frozen=True)
class Command:
    """A subcommand. `load` imports the libraries that its work takes, and returns the work."""

    summary: str
    config: type[Any]
    load: Callable[[], Work]
    usage: Usage
    check: Work = validate_bounds
    """Finds what is wrong with a config, before `load`."""
    to_go_on: tuple[str, ...] | None = None
    """Options that make the same command go on from where it was interrupted; None: it starts over."""


def _check_run(config: TrainConfig) -> None:
    validate(config)
    refuse_taken_early(config)


def _train() -> Work:
    import rl_lora.envs  # registers the environments

    return rl_lora.train


def _evaluate() -> Work:
    import rl_lora.envs  # registers the environments

    return rl_lora.evaluate


def _report() -> Work:
    from rl_lora.report.folder_page import write_reports

    return lambda config: write_reports(config.folders, config.out)


def _plot() -> Work:
    from rl_lora.report.accuracy_plot import plot_accuracy

    return lambda config: plot_accuracy(config.runs, config.out)


def _benchmark() -> Work:
    from rl_lora.scripts.benchmarks.benchmark import run

    return run


TASK = ("model.name", "env.id", "env.kwargs", "run_dir", "steps")
COMMANDS = {
    "train": Command(
        "Train an adapter by reward (policy gradient).",
        TrainConfig,
        _train,
        Usage(
            examples=(
                "--run_dir runs/first",
                "--run_dir runs/mine --env.id rl_lora/Prompts-v0 --env.kwargs.path problems.jsonl "
                "--env.kwargs.reward math --rollout.max_tokens 256",
                "--config runs/mine/config.yaml --resume true",
            ),
            first=(
                *TASK,
                "rollout.group_size",
                "rollout.max_tokens",
                "learner.learning_rate",
                "adapter.rank",
                "adapter.init_from",
                "resume",
            ),
        ),
        check=_check_run,
        to_go_on=("--resume", "true"),
    ),
    "evaluate": Command(
        "Evaluate adapters, and the bare base, on held-out problems.",
        EvaluateConfig,
        _evaluate,
        Usage(
            arguments="adapters",
            examples=("runs/first", "runs/first runs/mine --limit 500 --n 4 --temperature 0.7"),
            first=("adapters", "limit", "n", "temperature", "max_tokens", "against", "env.id", "env.kwargs", "out"),
        ),
        check=validate_evaluation,
        to_go_on=(),
    ),
    "sft": Command(
        "Train an adapter on demonstrations, before it is trained by reward.",
        SftConfig,
        _train,
        Usage(
            examples=(
                "--run_dir runs/sft --env.id rl_lora/Prompts-v0 --env.kwargs.path problems.jsonl "
                "--env.kwargs.demonstration '{answer}'",
            ),
            first=(*TASK, "rollout.max_tokens", "learner.learning_rate", "adapter.rank", "resume"),
        ),
        check=_check_run,
        to_go_on=("--resume", "true"),
    ),
    "report": Command(
        "Write the page of a training run or of an evaluation: report.html.",
        ReportConfig,
        _report,
        Usage(arguments="folders", examples=("runs/first",)),
    ),
    "plot": Command(
        "Draw the held-out accuracy of runs in one picture.",
        PlotConfig,
        _plot,
        Usage(arguments="runs", examples=("runs/sft runs/rl --out accuracy.png",)),
    ),
    "benchmark": Command(
        "Measure rollouts, learning and training steps on this machine.",
        BenchmarkConfig,
        _benchmark,
        Usage(
            examples=("", "--random llama-1b --rollouts 8x8x128 --steps"),
            first=("model.name", "random", "rollouts", "steps", "rounds", "breakdown", "out"),
        ),
    ),
}
COMPLETION = "Print the tab completion for a shell: bash, zsh or fish."


def main(*subcommand: str) -> NoReturn:
    """The command. `subcommand`: words before those that were typed, as the scripts have them."""
    args = [*subcommand, *sys.argv[1:]]
    if "_ARGCOMPLETE" in os.environ:
        from rl_lora.scripts.completion import complete

        complete({name: (command.summary, command.config, command.usage) for name, command in COMMANDS.items()})
    guard()
    if not args or args[0] in ("-h", "--help", "--version"):
        say(f"rl_lora {rl_lora.__version__}" if args[:1] == ["--version"] else overview())
        sys.exit(0 if args else USER_ERROR)
    name, *rest = args
    command = COMMANDS.get(name)
    if command is None or command.to_go_on is None:
        goes_on = ""
    else:
        goes_on = f"; this goes on from there: {again(name, rest, command.to_go_on)}"
    sys.exit(run(lambda: start(name, rest), goes_on))


def start(name: str, args: list[str]) -> None:
    """A subcommand, from its options to its end. Raises ValueError that says what is wrong."""
    if name == "completion":
        from rl_lora.scripts.completion import script_for

        say(script_for(args))
        return
    if name not in COMMANDS:
        raise ValueError(unknown(name))
    command = COMMANDS[name]
    config = parse(command.config, args, replace(command.usage, words=shlex.join(words(name))))
    sys.path.append(os.getcwd())  # modules of the user's own, also for the installed command
    command.check(config)
    work = command.load()
    signals.listen()
    work(config)


def unknown(name: str) -> str:
    if name.startswith("-"):
        return f"{name} stands before a command: name one first, as in {COMMAND} train; {COMMAND} --help lists them"
    names = [*COMMANDS, "completion"]
    return f"there is no command {name}{meant(name, nearest(name, names))}; {COMMAND} --help lists the commands"


def overview() -> str:
    """What `rl-lora --help` prints."""
    summaries = {name: command.summary for name, command in COMMANDS.items()} | {"completion": COMPLETION}
    return "\n".join(
        [
            f"usage: {COMMAND} COMMAND [--OPTION VALUE ...]",
            "",
            "Train LoRA adapters on Hugging Face causal language models by reward.",
            "",
            "commands:",
            *(f"  {name:<12}{text}" for name, text in summaries.items()),
            "",
            "example:",
            f"  {COMMAND} train --run_dir runs/first",
            f"  {COMMAND} evaluate runs/first",
            "",
            f"`{COMMAND} COMMAND --help` shows the options of a command, `{COMMAND} --version` the version.",
            f"On several GPUs: accelerate launch -m {COMMAND.replace('-', '_')} train ...",
        ]
    )


def again(name: str, args: list[str], options: tuple[str, ...]) -> str:
    """The command that was typed, with these options where it lacks them."""
    more = () if options == ("--resume", "true") and resumes(args) else options
    return shlex.join([*(launcher() or [*words(name), *args]), *more])


def resumes(args: list[str]) -> bool:
    given = [i for i, arg in enumerate(args) if arg.partition("=")[0] == "--resume"]
    if not given:
        return False
    _, equals, value = args[given[-1]].partition("=")
    following = args[given[-1] + 1 :][:1]
    value = value if equals else (following[0] if following and not following[0].startswith("-") else "true")
    return value.lower() in ("true", "yes", "on")
