"""What can be known to be wrong with a run before its model is loaded, and before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import AutoModelForCausalLM

from rl_lora import models
from rl_lora.adapter_io import check_adapter
from rl_lora.chat import Chat
from rl_lora.checkpoint import Checkpoints
from rl_lora.config import EpisodeConfig, ModelConfig, TrainConfig, differences, flatten, validate
from rl_lora.demonstrations import Demonstrations
from rl_lora.environment import environment, held_out
from rl_lora.lora import AdapterBank
from rl_lora.policy import context_length
from rl_lora.rollout import MakeEnv, RolloutWorker
from rl_lora.sampler import Completion


def preflight(config: TrainConfig, seeds: Iterable[int]) -> None:
    """Raises ValueError. `seeds` are training problems whose prompts must fit the model's context."""
    validate(config)
    check_plain(config)
    check_trackers(config.log.trackers)
    check_run_dir(config)
    make_env = environment(config.env)
    make_eval_env, eval_seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
    if config.adapter.init_from is not None:
        check_adapter(Path(config.adapter.init_from))
    chat, context = check_model(config.model, config.adapter.targets)
    if config.learner.objective == "likelihood":
        seeds = list(seeds)
        teacher = Demonstrations(make_env, chat, config.rollout, context_length=context)
        teacher.collect(seeds, adapters=[None])
        teacher.close()
    for make, problems in ((make_env, seeds), (make_eval_env, eval_seeds)):
        check_prompts(make, problems, chat, config.rollout, context)


def check_prompts(make_env: MakeEnv, seeds: Iterable[int], chat: Chat, config: EpisodeConfig, context: int) -> None:
    """Raises ValueError for a problem whose prompt does not fit the model's context."""
    worker = RolloutWorker(make_env, _NoSampler(), chat, config, context_length=context)
    for seed in seeds:
        worker.first_prompt(seed)
    worker.close()


def check_model(config: ModelConfig, targets: str | list[str] = "all-linear") -> tuple[Chat, int]:
    """Name, tokenizer, stop tokens and targets of a model, without its weights. Returns its chat format and context."""
    models.check_model(config.name, config.trust_remote_code)
    tokenizer = models.load_tokenizer(config.name, config.trust_remote_code)
    chat = Chat(tokenizer, None, config.stop_tokens, config.template_kwargs)
    model_config = models.load_config(config.name, config.trust_remote_code)
    if targets != "all-linear" and not config.trust_remote_code:
        with torch.device("meta"):
            AdapterBank(AutoModelForCausalLM.from_config(model_config)).match(targets)
    return chat, context_length(model_config)


def check_plain(config: TrainConfig) -> None:
    """A run writes its config down, so everything in it must be plain data."""
    for name, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name} must be numbers, texts, lists and mappings, as YAML has them, got {value!r} ({error}); a "
                "function is named as 'module:function'"
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


def check_run_dir(config: TrainConfig) -> None:
    """A folder that holds a run is only touched to continue that run."""
    run_dir = Path(config.run_dir)
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "is a file" if not there.is_dir() else "cannot be written to"
        raise ValueError(f"run_dir {config.run_dir!r}: {there} {problem}; choose another --run_dir")
    record = run_dir / "config.yaml"
    latest = Checkpoints(run_dir / "checkpoints", 1).latest()
    if not record.exists() or (latest is None and not config.resume):
        return  # nothing of a run that died before its first checkpoint is worth keeping
    if not config.resume:
        raise ValueError(
            f"{config.run_dir} already holds a run; continue it with --resume true, or choose another --run_dir"
        )
    if latest and latest.step > config.steps:
        raise ValueError(
            f"{config.run_dir} has come to step {latest.step}, behind steps={config.steps}; set --steps to "
            f"{latest.step} or more"
        )
    old = latest.state["config"] if latest else flatten_record(yaml.safe_load(record.read_text()))
    if changed := differences(config, old):
        raise ValueError(
            f"{config.run_dir} holds a run of another configuration, and resuming would mix the two: "
            f"{'; '.join(changed)}. Set these back, or choose another --run_dir"
        )


def flatten_record(nested: dict[str, Any]) -> dict[str, Any]:
    """The dotted names and values of a config.yaml."""
    known = set(flatten(TrainConfig()))

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if prefix in known or not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, item in value.items() for k, v in walk(f"{prefix}.{key}" if prefix else key, item).items()
        }

    return walk("", nested)


class _NoSampler:
    """Stands where prompts are rendered and nothing is sampled."""

    def generate(self, requests: Any, on_token: Any = None, follow: Any = None) -> list[list[Completion]]:
        raise AssertionError("nothing is sampled before the model is loaded")
