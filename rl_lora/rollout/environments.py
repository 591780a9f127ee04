"""From an environment's id to environments: for training, and for held-out evaluation.

Knows gymnasium's registry and nothing of particular environments.
"""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium as gym

from rl_lora.config import EnvConfig
from rl_lora.rollout.contract import Env, TaskError, begin, close, raised
from rl_lora.rollout.given import resolved
from rl_lora.rollout.worker import MakeEnv
from rl_lora.system.user_code import own_frames, own_lines

UNSPLIT_OFFSET = 3 * 10**9
"""First held-out seed where an environment has no split of its own: far from the seeds of training."""
TRIES = 10
"""Seeds that are looked at for one more held-out problem, before it is believed that there are no more."""


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
            return gym.make(with_module(config.id), disable_env_checker=True, **resolved(kwargs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit among them
            raise _not_made(error, config.id, kwargs) from error

    close(make())
    return make


def with_module(env_id: str) -> str:
    """A gymnasium id with the module that registers it: those of `rl_lora` need none."""
    return f"rl_lora.envs:{env_id}" if env_id.startswith("rl_lora/") else env_id


def _not_made(error: BaseException, name: str, kwargs: dict[str, Any]) -> ValueError:
    """Why there is no such environment, in the words of what went wrong."""
    if isinstance(error, gym.error.Error):
        origin = {id: getattr(spec.entry_point, "__module__", spec.entry_point) for id, spec in gym.registry.items()}
        there = sorted(id for id, module in origin.items() if not str(module).startswith("gymnasium."))
        return ValueError(
            f"unknown environment {name!r} ({error}); registered here: {', '.join(there) or 'none'}; an "
            "environment of your own is `module:id`, where importing the module registers the id"
        )
    if isinstance(error, ImportError):
        return ValueError(f"environment {name!r}: {error}")
    if not own_lines(own_frames(error)):  # no line of a user's own was reached
        if isinstance(error, TypeError):
            return ValueError(f"environment {name!r} does not take {kwargs}: {error}")
        if isinstance(error, ValueError):
            return error
    return raised(error, f"environment {name!r}", "making it")


def held_out(config: EnvConfig, env_kwargs: dict[str, Any] | None, episodes: int | None) -> tuple[MakeEnv, list[int]]:
    """The evaluation environment, and seeds of `episodes` different problems (None: all); see `EvalConfig.env_kwargs`.

    Problems differ if their first observations do; fewer seeds where the environment has fewer problems. In a game that
    always opens with the same words, what differs is hidden: there, every seed counts.
    """
    if episodes == 0:
        return environment(config), []
    takes_split = _takes_split(config)
    make = environment(config, **{**({"split": "eval"} if takes_split else {}), **(env_kwargs or {})})
    start = 0 if takes_split else UNSPLIT_OFFSET
    env = make()
    n_problems = getattr(env.unwrapped, "n_problems", None)
    if episodes is None:
        if n_problems is None:
            raise ValueError(f"{config.id} has no end of problems: set a limit")
        episodes = int(n_problems)
    seed_of: dict[str, int] = {}
    for seed in range(start, start + TRIES * episodes):
        if len(seed_of) == episodes:
            break
        try:
            seed_of.setdefault(begin(env, seed).observation, seed)
        except TaskError as error:
            if error.stops or (not seed_of and seed - start >= TRIES):
                raise
            if n_problems is not None:  # of a list, it is named by preflight; of problems without end, it is left out
                seed_of[f"\0{seed}"] = seed
    hidden = len(seed_of) == 1 and n_problems is None
    close(env)
    return make, list(range(start, start + episodes)) if hidden else list(seed_of.values())


def _takes_split(config: EnvConfig) -> bool:
    """Whether the environment has sides. One of them may be empty: data that are for evaluation only."""
    try:
        env = environment(config)()
    except ValueError as error:
        try:
            environment(config, split="eval")
        except ValueError:
            raise error from None
        return True
    close(env)
    return "split" in inspect.signature(type(env.unwrapped).__init__).parameters
