"""Text environments on gymnasium: `TextSpace`, `TextEnv`, and `SingleTurnEnv` for question -> answer -> reward.

A trainer reads four keys of the info of `step`, each of them optional:
    is_success: bool, the verdict, apart from the possibly shaped reward.
    reward_parts: dict[str, float], what the reward is made of.
    answer: str, what was judged, in one spelling, where the reward function says so.
    unscorable: str, why the reward function could not judge. The reward is then 0.0 and means nothing.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rl_lora.rewards import (
    Calls,
    Case,
    Judge,
    Messages,
    Reply,
    RewardError,
    RewardFunction,
    RewardSpec,
    Score,
    Unscorable,
    WeightedSum,
    code_of,
    modules_of,
    name_of,
    reference_fault,
    resolve,
)

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


Observation = str | Messages
"""An environment's part of the conversation: a text, which is a user's message, or messages with roles."""


class TextEnv(gym.Env[Any, str]):
    """An environment that speaks and listens in text, over one turn or many.

    A subclass writes `start(seed)` and `step(action)`. The seed decides the problem: `reset(seed=s)` gives the same
    problem in every copy of the environment, which is what makes a group of episodes. `reset()` draws a seed from
    `np_random`; `info["seed"]` says which, so that any problem can be played again.

    An observation, of `start` and of `step` alike, is a text, which is a user's message; or messages with roles, which
    the model's chat template renders, such as the result of a tool:

        [{"role": "tool", "content": "4"}, {"role": "user", "content": "Go on."}]

    Roles are system, developer, user, assistant and tool; not every template knows all of them. The last message is not
    the assistant's. Other keys of a message, such as `name`, are the template's to read. What the model wrote stays as
    it is, token by token: messages only stand behind it. A model without a chat template reads the contents, with an
    empty line between two messages.
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
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
    def start(self, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Set up the problem of `seed`, a function of `seed` alone; returns the first observation and info."""
        raise NotImplementedError

    @abstractmethod
    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one reply; returns observation, reward, terminated, truncated, info.

        A step that waits, for a network or another process, does not hold up the other episodes: once steps have been
        seen to wait, they run in threads (`rollout.reward_threads` at a time) while the other episodes are decoded.
        Copies of the environment must then share nothing that two threads may not change. A step that computes runs in
        the main thread. `reset` is called in the same way, before anything is decoded.
        """
        raise NotImplementedError


class _Problem(NamedTuple):
    question: str
    reference: Any
    demonstration: str | None = None


class Problem(_Problem):
    """What is asked, what the reward function compares the answer with, and a reply that solves it, where there is one.

    Apart from these three, `messages` is the question as a conversation, where it is one (`question` shows it as a
    text); `record` the row of the data that it was made of, whose columns reward functions may ask for by name; `place`
    where that row stands, such as a file and a line.
    """

    messages: Messages | None
    record: Mapping[str, Any] | None
    place: str

    def __new__(
        cls,
        question: str,
        reference: Any,
        demonstration: str | None = None,
        *,
        messages: Messages | None = None,
        record: Mapping[str, Any] | None = None,
        place: str = "",
    ) -> Problem:
        self = super().__new__(cls, question, reference, demonstration)
        self.messages, self.record, self.place = messages, record, place
        return self

    def _replace(self, **changes: Any) -> Problem:
        return Problem(**{**self._asdict(), **vars(self), **changes})


class SingleTurnEnv(TextEnv):
    """Question -> answer -> reward. A subclass writes `problem(seed)`.

    `reset` puts the reference into `info["reference"]`, a reply that solves the problem, where there is one, into
    `info["demonstration"]`, and a question that is a conversation into `info["messages"]`; `step` always terminates,
    with an empty last observation.
    """

    one_reply = True
    """An episode ends with its first reply: nothing has to wait for `step`."""

    def __init__(self, reward: RewardSpec) -> None:
        super().__init__()
        self.reward: RewardFunction = resolve(reward)
        self.judge = Judge(self.reward)
        self._problem: Problem | None = None
        self._seed: int | None = None
        self._ahead: tuple[str, Callable[[], Score | Unscorable]] | None = None

    @property
    def code(self) -> str:
        """The sources of its reward functions: the code that judges, beside the class itself."""
        return code_of(self.reward)

    @property
    def code_modules(self) -> set[str]:
        """The modules that its reward functions are of."""
        return modules_of(self.reward)

    @property
    def record(self) -> Mapping[str, Any] | None:
        """The row that the present problem was made of, where the reward function reads it: with another row, it is
        another problem."""
        record = None if self._problem is None else self._problem.record
        return record if record and self.judge.reads_record(record) else None

    @abstractmethod
    def problem(self, seed: int) -> Problem:
        """The problem of `seed`, a function of `seed` alone."""
        raise NotImplementedError

    @property
    def judged_by(self) -> str:
        """The name of the reward function that `step` waits for."""
        parts = self.reward.parts if isinstance(self.reward, WeightedSum) else None
        names = [name_of(self.reward)] if parts is None else [part.name for part in parts]
        return f"the reward {' + '.join(names)}"

    def problem_place(self, seed: int) -> str:
        """The file and line that the problem of `seed` comes from; empty where there is none."""
        return self.problem(seed).place

    def problem_fault(self, seed: int) -> str | None:
        """Why no reply to the problem of `seed` could be judged, by the reward's own rule; None where it is fine."""
        return reference_fault(self.reward, self.problem(seed).reference)

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        problem = self.problem(seed)
        # info may be kept, and changed, by its reader
        self._problem = problem._replace(reference=copy.deepcopy(problem.reference))
        self._seed, self._ahead = seed, None
        info = {"reference": self._problem.reference}
        if problem.demonstration is not None:
            info["demonstration"] = problem.demonstration
        if problem.messages is not None:
            info["messages"] = copy.deepcopy(problem.messages)
        self.judge.check(problem.record or {})
        return problem.question, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer and end the episode. Raises RewardError if the reward function fails."""
        if self._problem is None:
            raise gym.error.ResetNeeded(f"{self.name}: an episode is one answer long; call reset() before step()")
        where = f"{self.name}, seed {self._seed}"
        if not isinstance(action, str):
            raise ValueError(f"{where}: an action must be a str, got {action!r}")
        if self._ahead is None or self._ahead[0] != action:
            self._judge([(self, action, None)], None)
        assert self._ahead is not None
        (_, verdict), self._ahead, self._problem = self._ahead, None, None
        reward, info = _reported(verdict, where)
        return "", reward, True, False, info

    @property
    def judges_groups(self) -> bool:
        """Whether its reward function wants all replies to a problem at once."""
        return any(signature.batch for signature in self.judge.signatures)

    def judge_ahead(
        self, replies: Sequence[tuple[SingleTurnEnv, str, Sequence[int] | None]], calls: Calls | None = None
    ) -> None:
        """Begin to judge replies to this problem, each given to a copy of this environment, with its tokens where they
        are known; `step` of the copies, with the same reply, then only waits for the verdict. Left to `step` where a
        subclass has its own."""
        if self._problem is not None and type(self).step is SingleTurnEnv.step:
            self._judge(replies, calls)

    def _judge(self, replies: Sequence[tuple[SingleTurnEnv, str, Sequence[int] | None]], calls: Calls | None) -> None:
        problem = self._problem
        assert problem is not None
        prompt = problem.question if problem.messages is None else problem.messages
        judged = [Reply(text, None if ids is None else tuple(ids)) for _, text, ids in replies]
        verdicts = functools.cache(
            self.judge.start(Case(problem.reference, prompt, problem.record or {}), judged, calls)
        )
        for i, (env, text, _) in enumerate(replies):
            env._ahead = text, lambda i=i: verdicts()[i]


def judge(reward: RewardFunction, completion: str, reference: Any, where: str) -> tuple[float, dict[str, Any]]:
    """Score a completion and put the result as `step` reports it: the reward, and the info that goes with it.

    `where` names the environment and the problem in messages.

    Raises:
        RewardError: the function raised anything but Unscorable, or returned no finite number.
    """
    if not isinstance(completion, str):
        raise ValueError(f"{where}: an action must be a str, got {completion!r}")
    verdicts = Judge(reward).start(Case(reference), [Reply(completion)])
    return _reported(lambda: verdicts()[0], where)


def _reported(verdict: Callable[[], Score | Unscorable], where: str) -> tuple[float, dict[str, Any]]:
    try:
        result = verdict()
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error
    if isinstance(result, Unscorable):
        return 0.0, {"unscorable": str(result) or "the reward function gave no reason", "reward_parts": {}}
    info: dict[str, Any] = {"reward_parts": {name: float(value) for name, value in result.parts.items()}}
    if result.success is not None:
        info["is_success"] = bool(result.success)
    if result.answer is not None:
        info["answer"] = result.answer
    return float(result.value), info
