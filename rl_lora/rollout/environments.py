"""From an environment's id to environments: for training, and for held-out evaluation.

Knows gymnasium's registry and nothing of particular environments.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from rl_lora.config import EnvConfig
from rl_lora.rollout.contract import Env, close_env, raised
from rl_lora.rollout.python_objects import resolve_objects
from rl_lora.rollout.worker import MakeEnv
from rl_lora.system.user_code import user_frames, user_lines


def environment(config: EnvConfig, **overrides: Any) -> MakeEnv:
    """A function that makes the environment, after proof that it works.

    Raises:
        ValueError: unknown id, module that cannot be imported, arguments that the environment does not take, whatever
            else making it raises.
    """
    kwargs = {**config.kwargs, **overrides}

    def make() -> Env:
        try:
            # The passive checker would warn about text observations that are fine; `check_env` is for tests.
            return gym.make(with_module(config.id), disable_env_checker=True, **resolve_objects(kwargs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit among them
            raise _not_made(error, config.id, kwargs) from error

    close_env(make())
    return make


def with_module(env_id: str) -> str:
    """A gymnasium id with the module that registers it: those of `rl_lora` need none."""
    return f"rl_lora.envs:{env_id}" if env_id.startswith("rl_lora/") else env_id


def _not_made(error: BaseException, name: str, kwargs: dict[str, Any]) -> ValueError:
    """The error that says why an environment could not be made."""
    if isinstance(error, gym.error.Error):
        origin = {id: getattr(spec.entry_point, "__module__", spec.entry_point) for id, spec in gym.registry.items()}
        there = sorted(id for id, module in origin.items() if not str(module).startswith("gymnasium."))
        return ValueError(
            f"unknown environment {name!r} ({error}); registered here: {', '.join(there) or 'none'}; an "
            "environment of your own is `module:id`, where importing the module registers the id"
        )
    if isinstance(error, ImportError):
        return ValueError(f"environment {name!r}: {error}")
    if not user_lines(user_frames(error)):  # no line of a user's own was reached
        if isinstance(error, TypeError):
            return ValueError(f"environment {name!r} does not take {kwargs}: {error}")
        if isinstance(error, ValueError):
            return error
    return raised(error, f"environment {name!r}", "making it")
