"""The contract of an environment: `reset` and `step` are called here, and their results are checked.

Whatever goes wrong in a user's code becomes a `TaskError`, which names the environment, the seed and the reply, and
shows the user's own part of the traceback.
"""

from __future__ import annotations

import json
import math
import traceback
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym

from rl_lora.rollout.observations import check_messages, read_observation, shortened, shown
from rl_lora.system.messages import Messages
from rl_lora.system.user_code import causes, user_frames
from rl_lora.system.watchdog import watched

Env = gym.Env[Any, str]
"""An environment whose observations are texts or messages, and whose actions are texts."""

MAX_MESSAGE = 2000
"""Characters of an exception's own message."""


class TaskError(ValueError):
    """An environment or its reward function failed on one episode, or returned what it may not.

    `reason` is the short form that failed episodes are counted by; the message is the whole story. `stops`: the run
    cannot go on without this episode.
    """

    def __init__(self, message: str, reason: str, stops: bool = False):
        super().__init__(message)
        self.reason, self.stops = reason, stops


@dataclass(frozen=True)
class ResetResult:
    """The checked result of `reset`: a problem, and the info that goes with it."""

    observation: str
    info: Mapping[str, Any] = field(default_factory=dict)
    messages: Messages | None = None
    """The problem as a conversation, where it is one; the observation then shows it as a text."""

    @property
    def identity(self) -> tuple[str, ...]:
        """Observation, conversation and reference as texts: every episode of a seed must have the same."""
        return self.observation, _as_json(self.messages), _as_json(self.info.get("reference"))


@dataclass(frozen=True)
class StepResult:
    """The checked result of `step`. `success` and `answer` are None where the environment says nothing of them;
    `unscorable` is the reason why it could not judge, or None."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None = None
    answer: str | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    unscorable: str | None = None
    messages: Messages | None = None
    """The observation as messages, where it is given so; `observation` then shows them as a text."""


def env_id(env: Env) -> str:
    """The name of an environment in records and messages."""
    return env.spec.id if env.spec else type(env.unwrapped).__name__


def _as_json(value: Any) -> str:
    try:
        return "" if value is None else json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return ""  # two that mean the same need not look the same


def reset_env(env: Env, seed: int) -> ResetResult:
    """Reset an environment to the problem of a seed. Raises TaskError."""
    where = f"{env_id(env)}, seed {seed}"
    try:
        with watched(lambda: f"{where}: reset() has not answered"):
            result = env.reset(seed=seed)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit among them: it would end the run as if it were finished
        raise raised(error, where, "reset()") from error
    try:
        return read_reset(result)
    except ValueError as error:
        joint = " " if str(error).startswith("gives ") else f", seed {seed}: "
        raise TaskError(f"{env_id(env)}{joint}{error}", str(error)) from None


def step_env(env: Env, seed: int, reply: str) -> StepResult:
    """Give a reply to an environment. Raises TaskError."""
    where = f"{env_id(env)}, seed {seed}"
    try:
        with watch_step(env, seed):
            result = env.step(reply)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise raised(error, where, "step()", reply) from error
    try:
        return read_step(result)
    except ValueError as error:
        raise TaskError(f"{where}: {error}; the reply was {shown(reply)}", str(error)) from None


def close_env(env: Env) -> None:
    """Close an environment. An exception becomes a warning: all episodes have been played."""
    try:
        env.close()
    except (Exception, SystemExit) as error:
        warnings.warn(f"{env_id(env)}: close() raised {type(error).__name__}: {error}", stacklevel=1)


def watch_step(env: Env, seed: int) -> AbstractContextManager[None]:
    """Warn while the block runs, if it takes long, that an environment has not answered, or the reward function that it
    names as `judged_by`."""
    name = getattr(env.unwrapped, "judged_by", None)
    asked = name if isinstance(name, str) else "step()"
    return watched(lambda: f"{env_id(env)}, seed {seed}: {asked} has not answered")


def read_reset(result: Any) -> ResetResult:
    """The result of `reset` as a record. Raises ValueError unless it is (text or messages, mapping)."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(f"reset() must return (observation, info), got {shown(result)}")
    observation, info = result
    text, messages = read_observation(observation)
    info = _mapping(info, "the info of reset()")
    if (same := info.get("messages")) is not None:
        check_messages(same, "info['messages']")
        messages = same
    return ResetResult(text, info, messages)


def read_step(result: Any) -> StepResult:
    """The result of `step` as a record.

    Rewards and reward parts are finite numbers, of Python, NumPy or torch. Verdicts are bools, or 0 and 1.

    Raises:
        ValueError: anything is something else; the message says what, and the value.
    """
    if not isinstance(result, tuple | list) or len(result) != 5:
        raise ValueError(f"step() must return (observation, reward, terminated, truncated, info), got {shown(result)}")
    observation, reward, terminated, truncated, info = result
    info = _mapping(info, "the info of step()")
    success, answer, unscorable = (info.get(name) for name in ("is_success", "answer", "unscorable"))
    parts = _mapping(info.get("reward_parts", {}), "info['reward_parts']")
    ended = {name: truth(value, name) for name, value in (("terminated", terminated), ("truncated", truncated))}
    over = any(ended.values()) or unscorable  # then nobody reads the observation
    text, messages = ("", None) if over else read_observation(observation)
    return StepResult(
        text,
        finite_number(reward, "the reward"),
        **ended,
        success=None if success is None else truth(success, "info['is_success']"),
        answer=None if answer is None else str(answer),
        reward_parts={str(name): finite_number(value, f"the reward part {name!r}") for name, value in parts.items()},
        unscorable=_reason(unscorable),
        messages=messages,
    )


def finite_number(value: Any, what: str) -> float:
    """A finite number as a float. Raises ValueError, with `what` it is and the value, for anything else."""
    plain = _plain(value)
    try:
        if not isinstance(plain, SupportsFloat) or isinstance(plain, complex):
            raise TypeError
        result = float(plain)
    except Exception:
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{what} must be a finite number, got {shown(value)}")
    return result


def truth(value: Any, what: str) -> bool:
    """A bool, of Python, NumPy or torch, or 0 or 1. Raises ValueError for anything else: "False" is true to Python."""
    plain = _plain(value)
    if not isinstance(plain, bool | int | float) or plain not in (0, 1):
        raise ValueError(f"{what} must be True or False, got {shown(value)}")
    return bool(plain)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"<a message that raises {type(other).__name__}>"


def raised(error: BaseException, where: str, what: str, reply: str | None = None) -> TaskError:
    """An exception of an environment or a reward function as a TaskError, with the user's part of the traceback."""
    text = shortened(_text(error), MAX_MESSAGE)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    named = isinstance(error, ValueError) and text.startswith(where)  # by the environment: of a reward function
    reason = text.removeprefix(where).lstrip(": ") if named else f"{what} raised {said}"
    frames = user_frames(error)
    last = frames[-1] if frames else None
    place = "" if last is None else f" ({Path(last.filename).name}, line {last.lineno}, in {last.name})"
    message = f"{where}: {reason}{place}" + ("" if reply is None else f"; the reply was {shown(reply)}")
    if frames:  # as Python does: the code first, and what went wrong last
        message = f"in the code of the task, most recent call last:\n{''.join(traceback.format_list(frames))}{message}"
    return TaskError(message, reason, stops=any(isinstance(link, SystemExit) for link in causes(error)))


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's own; anything else as it is."""
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except Exception:  # more than one element
        return None


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a dict, got {shown(value)}")
    return value


def _reason(unscorable: Any) -> str | None:
    """Why an episode could not be judged, if it could not."""
    if not unscorable:
        return None
    return "the environment gave no reason" if unscorable is True else str(unscorable)
