"""Whether the problems of an environment can be played: looked at before the model is loaded, however many there are.

An environment may know more of a problem than its text. Two methods are asked where it has them: `problem_place`,
the file and line that a seed comes from, and `problem_fault`, why no reply to it could be judged, by the reward's own
rule.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence

from rl_lora.config import EpisodeConfig
from rl_lora.policy.chat import Chat
from rl_lora.rollout.contract import Env, TaskError, close_env, env_id, reset_env
from rl_lora.rollout.worker import MakeEnv, nondeterministic, prompt_of

N_REPEATED = 4
"""Number of problems that are reset several times, to see that a seed always leads to the same problem."""
TOKENS_PER_BYTE = 3
"""Upper bound of the tokens that a tokenizer makes of a byte, normalisation included (without it: one). A text that
fits at this rate need not be tokenised."""
A_FEW = 2
"""Number of faulty problems that are allowed in any case where problems are made from the seed."""
AT_LEAST, SECONDS = 2048, 120.0
"""Number of problems that are checked in any case, and seconds after which no more are."""
MAX_LISTED = 5
"""Faulty problems that a message names; the others are counted."""


def check_problems(
    make_env: MakeEnv, seeds: Iterable[int], chat: Chat, config: EpisodeConfig, context: int, *, judged: bool = True
) -> None:
    """Raises ValueError where a seed leads to several problems, or a problem cannot be played: its prompt does not fit
    the model's context, or nothing could be judged (not asked unless `judged`).

    Of an environment that makes its problems from the seed, the share `config.max_failed` may be such: nobody can mend
    one of them, and they are left out when their turn comes.
    """
    seeds = list(seeds) if not isinstance(seeds, Sequence) else seeds
    if not seeds:
        return
    env = make_env()
    try:
        check_deterministic(env, make_env, seeds[:N_REPEATED])
        faults = list(faults_of(env, seeds, chat, config, context, judged))
        made = getattr(env.unwrapped, "n_problems", None) is None
    finally:
        close_env(env)
    allowed = max(config.max_failed * len(seeds), A_FEW) if made and config.max_failed else 0
    if len(faults) > allowed or len(faults) == len(seeds):
        raise ValueError(list_faults(faults, len(seeds)))


def list_faults(faults: Sequence[str], n: int) -> str:
    """The first faulty problems and how many there are."""
    if len(faults) == 1:
        return faults[0]
    more = f"\n  ... and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    first = "".join(f"\n  {fault}" for fault in faults[:MAX_LISTED])
    return f"{len(faults)} of {n} problems cannot be played:{first}{more}"


def faults_of(
    env: Env, seeds: Sequence[int], chat: Chat, config: EpisodeConfig, context: int, judged: bool
) -> Iterable[str]:
    """The fault of each problem that cannot be played, with the place that it comes from."""
    fault_of: Callable[[int], str | None] = getattr(env.unwrapped, "problem_fault", lambda seed: None)
    place_of: Callable[[int], str] = getattr(env.unwrapped, "problem_place", lambda seed: "")
    around = len(chat.start("?", config.system_prompt))
    plain = getattr(getattr(chat.tokenizer, "backend_tokenizer", None), "normalizer", "unknown") is None
    surely_fits = (context - config.max_tokens - around) // (1 if plain else TOKENS_PER_BYTE)
    began = time.monotonic()
    for i, seed in enumerate(seeds):
        if i >= AT_LEAST and time.monotonic() - began > SECONDS:
            warnings.warn(
                f"{env_id(env)}: {i:,} of {len(seeds):,} problems were checked, in {SECONDS:.0f} s", stacklevel=2
            )
            return
        fault = fault_of(seed) if judged else None
        if fault is not None:
            fault = f"{env_id(env)}, seed {seed}: {fault}"
        else:
            try:
                start = reset_env(env, seed)
                if start.messages is not None or len(start.observation.encode()) > surely_fits:
                    prompt_of(env, seed, start, chat, config, context)
            except TaskError as error:
                if error.stops:
                    raise
                fault = str(error)
        if fault is not None:
            place = place_of(seed)
            yield f"{place}: {fault}" if place else fault


def check_deterministic(env: Env, make_env: MakeEnv, seeds: Sequence[int]) -> None:
    """Raises TaskError unless each seed leads to the same problem again, in whatever order, and in another copy."""
    first = {}
    for seed in seeds:
        with contextlib.suppress(TaskError):  # which `faults_of` counts
            first[seed] = reset_env(env, seed).identity
    copy = make_env()
    try:
        for again in (env, copy):
            for seed, identity in reversed(first.items()):
                if (other := reset_env(again, seed).identity) != identity:
                    raise nondeterministic(env_id(env), seed, identity, other)
    finally:
        close_env(copy)
