"""Held-out problems: which they are, and what adapters do on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rl_lora.config import EnvConfig
from rl_lora.metrics.summary import Evaluation
from rl_lora.rollout.contract import TaskError, close_env, reset_env
from rl_lora.rollout.environments import environment
from rl_lora.rollout.worker import EpisodeRequest, MakeEnv, RolloutWorker

UNSPLIT_OFFSET = 3 * 10**9
"""First held-out seed where an environment has no split of its own: far from the seeds of training."""
TRIES = 10
"""Seeds that are looked at for one more held-out problem, before it is believed that there are no more."""


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
            seed_of.setdefault(reset_env(env, seed).observation, seed)
        except TaskError as error:
            if error.stops or (not seed_of and seed - start >= TRIES):
                raise
            if n_problems is not None:  # of a list, it is named by preflight; of problems without end, it is left out
                seed_of[f"\0{seed}"] = seed
    hidden = len(seed_of) == 1 and n_problems is None
    close_env(env)
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
    close_env(env)
    return "split" in inspect.signature(type(env.unwrapped).__init__).parameters


def evaluate_adapters(
    worker: RolloutWorker,
    seeds: Sequence[int],
    adapters: Sequence[str | None],
    *,
    n: int = 1,
    temperature: float = 0.0,
    random_seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """n episodes of every seed under every adapter (None: the bare base), in the order of `adapters`."""
    wanted = [EpisodeRequest(adapter, seed, n) for adapter in adapters for seed in seeds]
    played = worker.play(wanted, random_seed=(random_seed,), temperature=temperature, on_token=on_token)
    problems = [tuple(episodes) for episodes in played]
    return [
        Evaluation(adapter, tuple(problems[i * len(seeds) : (i + 1) * len(seeds)]))
        for i, adapter in enumerate(adapters)
    ]
