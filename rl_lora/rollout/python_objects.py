"""Reward functions and rows that a script hands to `train` or `evaluate`, where a configuration could only name them.

The configuration holds a text in their place, so that a run can be written down. Whether a resumed run is given the
same again is what `trainer/task.py` finds out, which knows problems and code by their content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rl_lora.config import EnvConfig

PREFIX = "given in Python: "
PROMPTS = "rl_lora/Prompts-v0"
"""The environment that reads rows."""
OBJECTS: dict[str, Any] = {}
"""The objects that this process was handed, by the text that stands for each."""


def with_objects(env: EnvConfig, reward: Any = None, data: Any = None, eval_data: Any = None) -> EnvConfig:
    """The environment's configuration with these as its arguments `reward`, `path` and `eval_path`; where there are
    data and no environment but the default, that of `PROMPTS`."""
    objects = {"reward": reward, "path": data, "eval_path": eval_data}
    named = {name: _named(value, name) for name, value in objects.items() if value is not None}
    if not named:
        return env
    prompts = data is not None and env.id == EnvConfig().id
    return replace(env, id=PROMPTS if prompts else env.id, kwargs={**env.kwargs, **named})


def resolve_objects(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an environment, with objects in place of their texts. Raises ValueError for a text whose object
    this process was not handed."""
    for name, value in kwargs.items():
        if isinstance(value, str) and value.startswith(PREFIX) and value not in OBJECTS:
            parameter = {"path": "data", "eval_path": "eval_data"}.get(name, name)
            raise ValueError(
                f"env.kwargs.{name} was {value}: nothing here leads back to it; pass it again, as in "
                f"rl_lora.train(config, {parameter}=...) or rl_lora.evaluate(config, {parameter}=...)"
            )
    return {name: OBJECTS.get(value, value) if isinstance(value, str) else value for name, value in kwargs.items()}


def in_python(env: EnvConfig, adapter: str) -> str | None:
    """The call that evaluates an adapter on the task of a run, where a command could not name the task."""
    names = {"reward": "reward", "path": "data", "eval_path": "eval_data"}
    found = [name for name in names if str(env.kwargs.get(name, "")).startswith(PREFIX)]
    if not found:
        return None
    arguments = ", ".join(f"{names[name]}=..." for name in found)
    return f"rl_lora.evaluate(rl_lora.EvaluateConfig(adapters=[{adapter!r}], ...), {arguments})"


def _named(value: Any, name: str) -> Any:
    """`value` itself where it is plain data, else a text in its place."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if name == "reward" and _is_plain(value):
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, Iterator):
        value = list(value)
    text = f"{PREFIX}{_described(value, name)}"
    OBJECTS[text] = value
    return text


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _described(value: Any, name: str) -> str:
    if name != "reward":
        return f"{len(value)} rows of {name}" if hasattr(value, "__len__") else f"rows of {name}"
    if isinstance(value, dict):
        return f"the reward {{{', '.join(map(str, value))}}}"
    parts = value if isinstance(value, list | tuple) else [value]
    return f"the reward {', '.join(_name_of(part) for part in parts)}"


def _name_of(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    while hasattr(reward, "func"):  # functools.partial
        reward = reward.func
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"
