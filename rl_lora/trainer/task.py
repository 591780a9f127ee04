"""The task of a run or an evaluation, known by its content: the problems, and the code that asks and judges them.

Names and paths do not count: a file of problems that is edited is another task under the same name.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch

from rl_lora.algorithms.advantages import ADVANTAGES
from rl_lora.algorithms.registry import Record
from rl_lora.config import TrainConfig
from rl_lora.metrics.samples import content_hash
from rl_lora.policy.policy import Policy
from rl_lora.rollout.contract import TaskError, close_env, env_id, reset_env
from rl_lora.rollout.curriculum import SEED_STRIDE
from rl_lora.rollout.environments import environment
from rl_lora.rollout.held_out import held_out
from rl_lora.rollout.worker import MakeEnv
from rl_lora.settings.algorithm import advantage_of, objective_of
from rl_lora.system.user_code import user_sources

N_ENDLESS = 256
"""Number of training problems that are hashed where an environment makes new ones from every seed."""
MAX_HASHES = 4096
"""Number of hashes of problems, at most, in a run's record of its task."""

MOST_NUMBERS = 1024
"""Approximate number of elements of each weight that are hashed."""


@dataclass(frozen=True)
class ProblemRecord:
    """A problem, known by its content: `hash` is of its text, its reference, and what else it is judged by."""

    seed: int
    reference: Any
    hash: str
    demonstration: str | None = None
    failed: bool = False


def problems_of(make_env: MakeEnv, seeds: Iterable[int]) -> list[ProblemRecord]:
    """The problems of seeds, with the reference in `info["reference"]`, where there is one. An environment that judges
    a reply by more than that has a `record`, which belongs to the hash."""
    env = make_env()
    problems = []
    for seed in seeds:
        try:
            start = reset_env(env, seed)
        except TaskError as error:  # it is left out when its turn comes
            problems.append(ProblemRecord(seed, None, content_hash(env_id(env), seed, error.reason), failed=True))
            continue
        reference = start.info.get("reference")
        try:
            json.dumps(reference)
        except TypeError:
            reference = str(reference)
        record = getattr(env.unwrapped, "record", None)
        more = () if record is None else (record,)
        digest = content_hash(env_id(env), seed, start.observation, reference, *more)
        problems.append(ProblemRecord(seed, reference, digest, start.info.get("demonstration")))
    close_env(env)
    return problems


def sources(make_env: MakeEnv) -> tuple[list[str], Any]:
    """The sources of the environment's class and of those it is made of; and its `code`, where it has one: a text that
    stands for whatever else it judges with. Both with the user's own modules that they are in (`code_modules` of the
    environment names those of the code), and that these import."""
    env = make_env()
    kinds = [kind for kind in type(env.unwrapped).__mro__ if kind not in gym.Env.__mro__]
    code = getattr(env.unwrapped, "code", None)
    judges = user_sources(getattr(env.unwrapped, "code_modules", ()))
    close_env(env)
    asks = user_sources(kind.__module__ for kind in kinds)
    return [*(_source(kind) for kind in kinds), *asks], [code, *judges] if judges else code


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a REPL
        return kind.__qualname__


def task_record(config: TrainConfig) -> dict[str, Any]:
    """The record of a run's task, by which a resumed run knows it again. `config` is valid.

    The same whatever `steps`. Of an environment with a finite list of problems all are looked at, else the first ones.
    """
    make_env = environment(config.env)
    make_eval_env, eval_seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
    records: list[Record] = [objective_of(config.learner), ADVANTAGES[advantage_of(config.learner)]]
    (asks, judges), (eval_asks, eval_judges) = sources(make_env), sources(make_eval_env)
    env = make_env()
    n = getattr(env.unwrapped, "n_problems", None)
    close_env(env)
    first = config.seed * SEED_STRIDE
    seeds = range(first, first + N_ENDLESS) if n is None else range(first // n * n, first // n * n + n)
    return {
        "environment": content_hash(asks, eval_asks),
        "reward": content_hash(judges, eval_judges),
        "algorithm": content_hash(user_sources(record.function.__module__ for record in records)),
        "problems": _record(problems_of(make_env, seeds)),
        "held_out": _record(problems_of(make_eval_env, eval_seeds)),
    }


def model_record(policy: Policy) -> dict[str, Any]:
    """The record of a run's model, by which a resumed run knows it again: a folder may hold another one later. Some
    elements of each weight are hashed."""
    weights = []
    for name, tensor in sorted(policy.bank.model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // MOST_NUMBERS)].cpu().contiguous()
        weights.append((name, list(tensor.shape), some.view(torch.uint8).numpy().tobytes().hex()))
    template = policy.chat.tokenizer.chat_template
    return {"dtype": str(policy.dtype), "weights": content_hash(weights), "chat_template": content_hash(template)}


def model_changes(old: dict[str, Any], new: dict[str, Any], name: str) -> list[str]:
    """Differences between two records of `model_record`, in words. Weights of different dtypes are not compared."""
    changes = []
    if old["dtype"] == new["dtype"] and old["weights"] != new["weights"]:
        changes.append(f"the weights of the model {name} have changed")
    if old["chat_template"] != new["chat_template"]:
        changes.append(f"the chat template of the model {name} has changed")
    return changes


def _record(problems: list[ProblemRecord]) -> dict[str, Any]:
    """How many there are, and a hash of each; of so many that it would be long, of a few together. A problem that could
    not be asked has none: it may be another time."""
    size = max(1, math.ceil(len(problems) / MAX_HASHES))
    parts = (problems[i : i + size] for i in range(0, len(problems), size))
    hashes = [
        None if any(p.failed for p in part) else content_hash([(p.hash, p.demonstration) for p in part])[:8]
        for part in parts
    ]
    return {"n": len(problems), "hashes": hashes}


def task_changes(old: dict[str, Any], new: dict[str, Any], env: str) -> list[str]:
    """Differences between two records of `task_record`, in words. An entry that one of them lacks is no difference."""
    changes = []
    if old.get("environment", new["environment"]) != new["environment"]:
        changes.append(f"the source of the environment {env} has changed")
    if old.get("reward", new["reward"]) != new["reward"]:
        changes.append("the source of the reward function has changed")
    if "algorithm" in old and old["algorithm"] != new["algorithm"]:
        changes.append("the source of the objective, or of the advantage, has changed")
    for name, what in (("problems", "training problems"), ("held_out", "held-out problems")):
        then, now = old.get(name, {}), new[name]
        pairs = list(zip(then.get("hashes", ()), now["hashes"], strict=False))
        if then.get("n", now["n"]) != now["n"]:
            changes.append(f"there were {then['n']} {what}, there are {now['n']}")
        elif n_changed := sum(None not in pair and pair[0] != pair[1] for pair in pairs):
            some = f"{n_changed} of {now['n']}" if len(pairs) == now["n"] else f"some of {now['n']}"
            changes.append(f"{some} {what} ask something else, or have another reference or solution")
    return changes
