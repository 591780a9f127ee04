"""Calling reward functions, and weighted sums of them that report their parts, on all replies to one problem."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl_lora.rewards.background import AtOnce, Calls, in_loop
from rl_lora.rewards.score import (
    Case,
    NotApplicable,
    Reply,
    RewardError,
    RewardFunction,
    Score,
    Unscorable,
    as_score,
    is_built_in,
    name_of,
)
from rl_lora.rewards.signature import Signature, read
from rl_lora.system.plurals import counted

Verdicts = list[Score | Unscorable]
"""One for each reply."""


@dataclass(frozen=True)
class Part:
    """One summand. A weight of 0 makes it a metric: reported, and worth nothing."""

    name: str
    function: RewardFunction
    weight: float


@dataclass(frozen=True)
class WeightedSum:
    """A reward: value = sum of weight * part.

    `parts` of its score hold each part's own value, before its weight; what a part itself reports is kept as
    "part/name". Verdict and answer are those of the first part that has a verdict. One unscorable part, whatever its
    weight, leaves the whole completion unscorable: a verdict that is missing must not look like one. A part that does
    not apply (a batch function's None) is left out of the sum, unless none applies.
    """

    parts: tuple[Part, ...]

    def __call__(self, completion: str, reference: Any = None) -> Score:
        """Raises Unscorable and RewardError as the parts do."""
        return score(self, completion, reference)

    def combine(self, scores: Sequence[Score | Unscorable]) -> Score | Unscorable:
        """The sum of what the parts say of one completion."""
        total = 0.0
        values: dict[str, float] = {}
        success: bool | None = None
        answer: str | None = None
        missing = [result for result in scores if isinstance(result, Unscorable)]
        for reason in missing:
            if not isinstance(reason, NotApplicable) or len(missing) == len(scores):
                return reason
        for part, result in zip(self.parts, scores, strict=True):
            if isinstance(result, Unscorable):
                continue
            total += part.weight * result.value
            values[part.name] = result.value
            values |= {f"{part.name}/{inner}": value for inner, value in result.parts.items()}
            if success is None:
                success, answer = result.success, result.answer
        return Score(total, values, success, answer)


class Judge:
    """A reward function, or a sum of them, ready to be called on problems whose data have these columns (None: they are
    looked at in each problem). Raises ValueError where a function wants a column that is not there."""

    def __init__(self, reward: RewardFunction, columns: Collection[str] | None = None, name: str | None = None):
        self.reward, self.name = reward, name or name_of(reward)
        self.parts = (
            [Judge(p.function, columns, p.name) for p in reward.parts] if isinstance(reward, WeightedSum) else []
        )
        self._read = functools.lru_cache(maxsize=16)(self._signature)
        self._columns = None if columns is None else tuple(sorted(columns))
        if not self.parts:
            self._read(self._columns)

    def _signature(self, columns: tuple[str, ...] | None) -> Signature:
        return read(self.reward, self.name, () if self._ours else columns)

    @property
    def _ours(self) -> bool:
        """Whether this is a function of this package: no column of the data is meant for its options."""
        return is_built_in(_function(self.reward))

    def check(self, columns: Collection[str]) -> None:
        """Raises ValueError where a function wants a column that is not among these."""
        if self._columns is None:
            for leaf in self.leaves:
                leaf._read(tuple(sorted(columns)))

    def reads_record(self, columns: Collection[str]) -> bool:
        """Whether a function reads more of data with these columns than the reference."""
        return any(leaf._read(leaf._columns or tuple(sorted(columns))).needs_record for leaf in self.leaves)

    @property
    def leaves(self) -> list[Judge]:
        """The functions that are called."""
        return [leaf for part in self.parts for leaf in part.leaves] if self.parts else [self]

    @property
    def signatures(self) -> list[Signature]:
        return [leaf._read(leaf._columns) for leaf in self.leaves]

    def start(self, case: Case, replies: Sequence[Reply], calls: Calls | None = None) -> Callable[[], Verdicts]:
        """Begin to judge replies to one problem; what is returned waits for the verdicts, each time that it is called,
        and raises RewardError, naming the function, for whatever went wrong but `Unscorable`."""
        calls = calls or AtOnce()
        if self.parts:
            assert isinstance(self.reward, WeightedSum)
            started = [part.start(case, replies, calls) for part in self.parts]
            combine = self.reward.combine
            return lambda: [combine(scores) for scores in zip(*(result() for result in started), strict=True)]
        signature = self._read(tuple(sorted(case.record)) if self._columns is None else self._columns)
        batches = [replies] if signature.batch else [[reply] for reply in replies]
        results = [self._start(signature, case, batch, calls) for batch in batches]
        return lambda: [verdict for result in results for verdict in result()]

    def _start(
        self, signature: Signature, case: Case, replies: Sequence[Reply], calls: Calls
    ) -> Callable[[], Verdicts]:
        metrics: dict[str, float] = {}
        logs = {"log_metric": metrics.__setitem__, "log_extra": lambda column, values: None}

        def call() -> Any:
            value = signature.call(self.reward, case, replies, logs)
            return in_loop(value, calls.limit) if inspect.isawaitable(value) else value

        future = calls.start(None if self._ours else id(_function(self.reward)), call)

        def result() -> Verdicts:
            value = self._guarded(future.result)
            if isinstance(value, Unscorable):
                return [value] * len(replies)
            if not signature.batch:
                return [as_score(value, self.name)]
            return [self._verdict(each, metrics) for each in self._listed(value, len(replies))]

        return result

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """What a call returns, or the Unscorable that it raised."""
        try:
            return call()
        except Unscorable as reason:
            return reason
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(f"the reward function {self.name} raised {type(error).__name__}: {error}") from error

    def _listed(self, value: Any, n: int) -> list[Any]:
        """The list that a batch function returned."""
        values = value.tolist() if hasattr(value, "tolist") else value  # of numpy, of torch
        if not isinstance(values, list | tuple):
            raise RewardError(
                f"the reward function {self.name} takes a batch, so it must return a list of numbers or Scores, got "
                f"{value!r}"
            )
        if len(values) != n:
            rewards, completions = counted(len(values), "reward"), counted(n, "completion")
            raise RewardError(f"the reward function {self.name} returned {rewards} for {completions}")
        return list(values)

    def _verdict(self, value: Any, metrics: dict[str, float]) -> Score | Unscorable:
        if value is None:
            return NotApplicable(f"the reward function {self.name} returned None: not applicable")
        if isinstance(value, Unscorable):
            return value
        score = as_score(value, self.name)
        return replace(score, parts={**score.parts, **{k: as_score(v, self.name).value for k, v in metrics.items()}})


def _function(reward: RewardFunction) -> Any:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def score(
    reward: RewardFunction, completion: str, reference: Any = None, name: str | None = None, **case: Any
) -> Score:
    """Call `reward` on one completion, and make a `Score` of what it returns. `case`: `prompt` and `record`.

    Raises Unscorable as the function did, and RewardError, naming the function, for anything else that went wrong.
    """
    try:
        judge = _judge_of(reward, name)
    except TypeError:  # a function that has no hash
        judge = Judge(reward, None, name)
    (verdict,) = judge.start(Case(reference, **case), [Reply(completion)])()
    if isinstance(verdict, Unscorable):
        raise verdict
    return verdict


@functools.lru_cache(maxsize=64)
def _judge_of(reward: RewardFunction, name: str | None) -> Judge:
    return Judge(reward, None, name)
