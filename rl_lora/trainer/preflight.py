"""Faults of a run that show before its model is loaded, and before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from rl_lora.config import TrainConfig
from rl_lora.lora.peft_io import check_adapter
from rl_lora.policy.inspection import inspect_model
from rl_lora.rollout.contract import close_env
from rl_lora.rollout.demonstrations import Demonstrations
from rl_lora.rollout.environments import environment
from rl_lora.rollout.held_out import held_out
from rl_lora.rollout.problems import check_problems
from rl_lora.rollout.worker import MakeEnv
from rl_lora.settings.algorithm import objective_of
from rl_lora.settings.dotted import flatten
from rl_lora.settings.validation import validate
from rl_lora.trainer.checkpoint import check_whole
from rl_lora.trainer.run_folder import check_run_dir


def preflight(config: TrainConfig, seeds: Iterable[int]) -> None:
    """Raises ValueError for a run that cannot be. `seeds`: training problems to check where there is no finite list."""
    validate(config)
    check_plain_data(config)
    check_trackers(config.log.trackers)
    check_run_dir(config)
    make_env = environment(config.env)
    make_eval_env, eval_seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
    if config.adapter.init_from is not None:
        check_adapter(Path(config.adapter.init_from))
        check_whole(Path(config.adapter.init_from))
    chat, context = inspect_model(config.model, config.adapter.targets)
    objective = objective_of(config.learner)
    seeds = problems_to_check(make_env, seeds)
    if not objective.needs_samples:
        teacher = Demonstrations(make_env, chat, config.rollout, context_length=context)
        teacher.collect(seeds, adapters=[None])
        teacher.close()
    check_problems(make_env, seeds, chat, config.rollout, context, judged=objective.needs_rewards)
    held_out_seeds = eval_seeds and problems_to_check(make_eval_env, eval_seeds)
    check_problems(make_eval_env, held_out_seeds, chat, config.rollout, context)


def problems_to_check(make_env: MakeEnv, seeds: Iterable[int]) -> Sequence[int]:
    """All problems, where they are a finite list; else those of `seeds`."""
    env = make_env()
    n = getattr(env.unwrapped, "n_problems", None)
    close_env(env)
    return list(seeds) if n is None else range(int(n))


def check_plain_data(config: TrainConfig) -> None:
    """A run writes its config down, so everything in it must be plain data."""
    for name, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name} must be numbers, texts, lists and mappings, as YAML has them, got {value!r} ({error}); a "
                "function is named as 'module:function', or handed to rl_lora.train(config, reward=..., data=...)"
            ) from error


def check_trackers(names: list[str]) -> None:
    """Every tracker is one of accelerate's, and installed: accelerate itself would leave it out without a word."""
    installed = [str(kind.value) for kind in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"unknown tracker {name!r} in log.trackers; accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in installed:
            raise ValueError(f"tracker {name!r} in log.trackers is not installed; install its package, or leave it out")
