"""How many episodes may fail before a run stops: one row must not end it, and a broken reward function must.

An episode fails where its environment or reward function raises, or returns what it may not, and where its prompt does
not fit the model. It is left out of its group and counted, never scored 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_lora.rollout.contract import TaskError

FEW = 32
"""Failures up to this number never stop a run, whatever share they are."""
RECENT = 10
"""Batches over which the share is taken: few, so that a fault in the middle of a long run shows soon."""


@dataclass
class BatchCounts:
    """Counts of the episodes that are played together."""

    n: int
    n_failed: int = 0


class Failures:
    """Counts the failed episodes of one worker.

    The run stops where more than `max_share` of the episodes of the last batches have failed, and more than a few:
    `FEW`, or the episodes of one problem. It stops too where all have failed; and with the first one, if `max_share` is
    0.

    Args:
        say: told the first failure, if the run goes on.
    """

    def __init__(self, max_share: float, say: Callable[[TaskError], None] = lambda error: None):
        self.max_share, self.say = max_share, say
        self.recent: deque[BatchCounts] = deque(maxlen=RECENT)
        self.first: TaskError | None = None
        self._few, self._said = FEW, False

    def begin(self, sizes: Sequence[int]) -> None:
        """A batch of so many episodes of each problem begins."""
        self.recent.append(BatchCounts(sum(sizes)))
        self._few = max(FEW, *sizes)

    def add(self, error: TaskError) -> None:
        """One more episode has failed. Raises TaskError where these are too many, or this one stops the run."""
        if error.stops or self.max_share == 0:
            raise error
        self.first = self.first or error
        self.recent[-1].n_failed += 1
        n, n_failed = self._counts()
        if n_failed > max(self.max_share * n, self._few):
            raise self._too_many(error)

    def end(self) -> None:
        """The batch is over. Raises TaskError where all that were played of late have failed."""
        n, n_failed = self._counts()
        if self.first is None:
            return
        if n_failed == n:
            raise self._too_many(self.first)
        if not self._said:
            self._said = True
            self.say(self.first)

    def _counts(self) -> tuple[int, int]:
        return sum(batch.n for batch in self.recent), sum(batch.n_failed for batch in self.recent)

    def _too_many(self, example: TaskError) -> TaskError:
        n, n_failed = self._counts()
        message = f"{example} ({n_failed} of {n} episodes have failed; max_failed={self.max_share:g} is what may)"
        error = TaskError(message, example.reason, stops=True)
        error.__cause__ = example
        return error
