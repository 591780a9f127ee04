"""Text environments on gymnasium: `TextSpace`, `TextEnv`, and `SingleTurnEnv` for question -> answer -> reward.

A trainer reads four keys of the info of `step`, each of them optional:
    is_success: bool, the verdict, apart from the possibly shaped reward.
    reward_parts: dict[str, float], what the reward is made of.
    answer: str, what was judged, in one spelling, where the reward function says so.
    unscorable: str, why the reward function could not judge. The reward is then 0.0 and means nothing.
"""

from __future__ import annotations

import copy
import difflib
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rewards import RewardError, RewardFunction, RewardSpec, Unscorable, code_of, resolve, score

MAX_LENGTH = 2**20
_SAMPLE_LENGTH = 64


class TextSpace(gym.spaces.Text):
    """Any `str` of at most `max_length` characters: the empty one and every character included."""

    def __init__(self, max_length: int = MAX_LENGTH, *, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(
        self,
        mask: tuple[int | None, NDArray[np.int8] | None] | None = None,
        probability: tuple[int | None, NDArray[np.float64] | None] | None = None,
    ) -> str:
        """A random alphanumeric text, short unless `mask` or `probability` gives a length."""
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(min(self.max_length, _SAMPLE_LENGTH) + 1)), None)
        return super().sample(mask, probability)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"TextSpace({self.max_length})"


class TextEnv(gym.Env[str, str]):
    """An environment that speaks and listens in text, over one turn or many.

    A subclass writes `start(seed)` and `step(action)`. The seed decides the problem: `reset(seed=s)` gives the same
    problem in every copy of the environment, which is what makes a group of episodes. `reset()` draws a seed from
    `np_random`; `info["seed"]` says which, so that any problem can be played again.
    """

    def __init__(self) -> None:
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    @property
    def n_problems(self) -> int | None:
        """How many problems there are, n; None if they do not run out. n seeds in a row, from a multiple of n on, lead
        to all of them: what `rollout.curriculum` chooses from."""
        return None

    @property
    def name(self) -> str:
        """The registered id, or the class where there is none; for messages."""
        return self.spec.id if self.spec else type(self).__name__

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of `seed`, or of a seed drawn from `np_random`. No options are known."""
        super().reset(seed=seed)
        problem_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        started = self.start(problem_seed)
        if not isinstance(started, tuple | list) or len(started) != 2 or not isinstance(started[1], Mapping):
            raise ValueError(
                f"{self.name}, seed {problem_seed}: start() must return (observation, info), got {started!r:.200}"
            )
        observation, info = started
        return observation, {"seed": problem_seed, **info}

    @abstractmethod
    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Set up the problem of `seed`, a function of `seed` alone; returns the first observation and info."""
        raise NotImplementedError

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one reply; returns observation, reward, terminated, truncated, info."""
        raise NotImplementedError


class Problem(NamedTuple):
    """What is asked, and what the reward function compares the answer with."""

    question: str
    reference: Any
    demonstration: str | None = None
    """A reply that solves it."""


class SingleTurnEnv(TextEnv):
    """Question -> answer -> reward. A subclass writes `problem(seed)`.

    `reset` puts the reference into `info["reference"]`, and a reply that solves the problem, where there is one, into
    `info["demonstration"]`; `step` always terminates, with an empty last observation.
    """

    def __init__(self, reward: RewardSpec) -> None:
        super().__init__()
        self.reward: RewardFunction = resolve(reward)
        self._problem: Problem | None = None
        self._seed: int | None = None

    @property
    def code(self) -> str:
        """What it judges with, beside its class: the sources of its reward functions."""
        return code_of(self.reward)

    @abstractmethod
    def problem(self, seed: int) -> Problem:
        """The problem of `seed`, a function of `seed` alone."""
        raise NotImplementedError

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        question, reference, demonstration = self.problem(seed)
        self._problem = Problem(question, copy.deepcopy(reference))  # info may be kept, and changed, by its reader
        self._seed = seed
        info = {"reference": self._problem.reference}
        return question, info if demonstration is None else {**info, "demonstration": demonstration}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer and end the episode. Raises RewardError if the reward function fails."""
        if self._problem is None:
            raise gym.error.ResetNeeded(f"{self.name}: an episode is one answer long; call reset() before step()")
        problem, self._problem = self._problem, None
        reward, info = judge(self.reward, action, problem.reference, f"{self.name}, seed {self._seed}")
        return "", reward, True, False, info


def judge(reward: RewardFunction, completion: str, reference: Any, where: str) -> tuple[float, dict[str, Any]]:
    """Score a completion and put the result as `step` reports it: the reward, and the info that goes with it.

    `where` names the environment and the problem in messages.

    Raises:
        RewardError: the function raised anything but Unscorable, or returned no finite number.
    """
    if not isinstance(completion, str):
        raise ValueError(f"{where}: an action must be a str, got {completion!r}")
    try:
        result = score(reward, completion, reference)
    except Unscorable as reason:
        return 0.0, {"unscorable": str(reason) or "the reward function gave no reason", "reward_parts": {}}
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error
    info: dict[str, Any] = {"reward_parts": {name: float(value) for name, value in result.parts.items()}}
    if result.success is not None:
        info["is_success"] = bool(result.success)
    if result.answer is not None:
        info["answer"] = result.answer
    return float(result.value), info


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> set[str]:
    """What stands between single braces in `template`. Raises ValueError if that is not a text."""
    if not isinstance(template, str):
        raise ValueError(f"template must be a text, got {template!r}")
    return set(_PLACEHOLDER.findall(template))


def check_placeholders(what: str, template: str, names: Collection[str]) -> None:
    """Raise ValueError for a name in braces that is nearly one of these: it would stand in the text as it is. Other
    braces are meant, such as those of LaTeX."""
    for placeholder in sorted(placeholders(template) - set(names)):
        if near := difflib.get_close_matches(placeholder, sorted(names), 1, cutoff=0.75):
            raise ValueError(
                f"{what} names {{{placeholder}}}: did you mean {{{near[0]}}}? There are {', '.join(names)}"
            )


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with {name} replaced for each name in `values`; all other braces, in values too, stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
