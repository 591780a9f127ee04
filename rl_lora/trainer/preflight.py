"""What can be known to be wrong with a run before its model is loaded, and before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import AutoModelForCausalLM

from rl_lora.config import ModelConfig, TrainConfig
from rl_lora.lora.bank import AdapterBank
from rl_lora.lora.peft_io import check_adapter
from rl_lora.policy import loading
from rl_lora.policy.chat import Chat
from rl_lora.rollout.contract import close
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
    """Raises ValueError. `seeds` are training problems that are looked at where their number is not finite."""
    validate(config)
    check_plain(config)
    check_trackers(config.log.trackers)
    check_run_dir(config)
    make_env = environment(config.env)
    make_eval_env, eval_seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
    if config.adapter.init_from is not None:
        check_adapter(Path(config.adapter.init_from))
        check_whole(Path(config.adapter.init_from))
    chat, context = check_model(config.model, config.adapter.targets)
    objective = objective_of(config.learner)
    seeds = whole(make_env, seeds)
    if not objective.needs_samples:
        teacher = Demonstrations(make_env, chat, config.rollout, context_length=context)
        teacher.collect(seeds, adapters=[None])
        teacher.close()
    check_problems(make_env, seeds, chat, config.rollout, context, judged=objective.needs_rewards)
    check_problems(make_eval_env, eval_seeds and whole(make_eval_env, eval_seeds), chat, config.rollout, context)


def whole(make_env: MakeEnv, seeds: Iterable[int]) -> Sequence[int]:
    """All problems, where they are a finite list; else those of `seeds`."""
    env = make_env()
    n = getattr(env.unwrapped, "n_problems", None)
    close(env)
    return list(seeds) if n is None else range(int(n))


def check_model(config: ModelConfig, targets: str | list[str] = "all-linear") -> tuple[Chat, int]:
    """Name, tokenizer, stop tokens and targets of a model, without its weights. Returns its chat format and context."""
    loading.check_model(config.name, config.trust_remote_code)
    tokenizer = loading.load_tokenizer(config.name, config.trust_remote_code)
    chat = Chat(tokenizer, None, config.stop_tokens, config.template_kwargs)
    model_config = loading.load_config(config.name, config.trust_remote_code)
    if targets != "all-linear" and not config.trust_remote_code:
        with torch.device("meta"):
            AdapterBank(AutoModelForCausalLM.from_config(model_config)).match(targets)
    return chat, loading.context_length(model_config)


def check_plain(config: TrainConfig) -> None:
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
