"""The command to type after a run: it evaluates the run's adapter."""

from __future__ import annotations

import json
import shlex

from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.settings.dotted import flatten
from rl_lora.settings.from_run import OF_RUN
from rl_lora.system.invocation import words


def next_command(config: TrainConfig, adapter: str) -> str:
    """The command that evaluates an adapter on the held-out problems of its run."""
    return shlex.join([*words("evaluate"), "--adapters", adapter, *_flags(config)])


def _flags(config: TrainConfig) -> list[str]:
    """Options with which an evaluation repeats the run's own, beside those that it takes from the run."""
    mine, flags = flatten(config), []
    elsewhere: dict[str, tuple[str, ...]] = {"limit": ("eval.episodes",), "resume": ()}
    for name, default in flatten(EvaluateConfig()).items():
        places = elsewhere.get(name, (f"eval.{name}", f"rollout.{name}", name))
        value = next((mine[place] for place in places if place in mine), default)
        # None held out in the run is no reason for none later.
        if value != default and name not in OF_RUN and (name, value) != ("limit", 0):
            flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flags
