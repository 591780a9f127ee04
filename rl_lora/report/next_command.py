"""The command that goes on from a finished run, as it can be typed in the same place."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from rl_lora.config import EvaluationSettings, TrainConfig, flatten
from rl_lora.evaluation.run_task import OF_RUN


def next_command(config: TrainConfig, adapter: str) -> str:
    """Evaluates the run's adapter as the run did."""
    return shlex.join([*evaluate_command(), "--adapters", adapter, *_flags(config)])


def evaluate_command() -> list[str]:
    """The words that start an evaluation here: the clone's script, or what is installed beside this command."""
    started, name = Path(sys.argv[0]), "rl-lora-evaluate"
    script = (Path(__file__).parents[1] / "scripts").resolve() / "evaluate.py"
    if not started.name.startswith("rl-lora-") and (script.parents[1] / "setup.cfg").is_file():
        return [_python(), _shown(script)]
    beside = started if started.name.startswith("rl-lora-") else Path(sys.executable)
    installed = beside.with_name(name + started.suffix if beside == started else name)
    return [name if _is_found(name, installed) else _shown(installed)]


def _python() -> str:
    """This Python, as a command typed here would name it: an environment of the project is seldom activated."""
    here, python = Path.cwd(), Path(sys.executable)
    if python.is_relative_to(here):
        return str(python.relative_to(here))
    return "python" if _is_found("python", python) else str(python)


def _is_found(name: str, path: Path) -> bool:
    """Whether a shell that is given the name alone starts this file. Links are not followed: nor is a venv's."""
    found = shutil.which(name)
    return found is not None and os.path.abspath(found) == os.path.abspath(path)


def _shown(path: Path) -> str:
    """A path as it can be typed here."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _flags(config: TrainConfig) -> list[str]:
    """What an evaluation has to be told to repeat this run's: what it does not take from the run itself."""
    mine, flags = flatten(config), []
    elsewhere: dict[str, tuple[str, ...]] = {"limit": ("eval.episodes",), "resume": ()}
    for name, default in flatten(EvaluationSettings()).items():
        places = elsewhere.get(name, (f"eval.{name}", f"rollout.{name}", name))
        value = next((mine[place] for place in places if place in mine), default)
        # None held out in the run is no reason for none later.
        if value != default and name not in OF_RUN and (name, value) != ("limit", 0):
            flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flags
