"""When environments are given the replies of a rollout, so that slow rewards wait for each other and not the sampler.

An environment that ends with its first reply is told it at once, and asked for what came of it when nothing is sampled
any more. Where a next turn depends on it, the steps of one look at the batch run at the same time, and sampling goes on
when all of them are done: what is sampled together never depends on how long a step takes.

Of an environment are used, where it has them:
`one_reply`: its episodes end with their first reply.
`judge_ahead(replies, calls)`: begins to judge replies, (copy of the environment, text, tokens), which `step` waits for.
`judges_groups`: it wants all replies to a problem together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, Protocol, TypeVar

from rl_lora.rollout.calls import Calls
from rl_lora.rollout.contract import Env, Outcome, advance, waiting
from rl_lora.sampler.protocol import Later, Request
from rl_lora.types import Stop, Turn


class Playing(Protocol):
    """An episode in the making."""

    env: Env
    seed: int
    turns: list[Turn]
    stop: Stop | None


Play = TypeVar("Play", bound=Playing)


class Steps(Generic[Play]):
    """The steps of the episodes that are played together, by group.

    Args:
        take: writes down the outcome of an episode's last reply, which the function gives or raises TaskError for.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Play]],
        calls: Calls,
        max_turns: int,
        take: Callable[[Play, Callable[[], Outcome]], None],
    ):
        self.calls, self.max_turns, self.take = calls, max_turns, take
        self.seconds = 0.0
        """That sampling waited for steps."""
        playing = [[play for play in group if play.stop is None] for group in groups]
        self._groups = {id(play): group for group in playing for play in group}
        self._told: dict[int, list[Play]] = {}
        self._open: dict[int, tuple[Play, Callable[[], Outcome]]] = {}

    def reply(self, play: Play, then: Callable[[], Request | None]) -> Request | Later | None:
        """An episode has its next reply, the last of its turns. `then` says what it asks when the step is taken."""
        with self._watch():
            if hasattr(play.env.unwrapped, "judge_ahead"):
                self._judge(play)
                return None
            future = self.calls.start(type(play.env.unwrapped), _step(play))
            if future.done():
                self.take(play, future.result)
                return then()
        if self.max_turns == 1 or getattr(play.env.unwrapped, "one_reply", False):
            self._open[id(play)] = play, future.result
            return None

        def later() -> Request | None:
            with self._watch():
                self.take(play, future.result)
            return then()

        return later

    def finish(self, plays: Sequence[Play]) -> None:
        """Nothing is sampled any more: wait for what is still open, in the order of the episodes."""
        with self._watch():
            for play in plays:
                if id(play) in self._open:
                    self.take(*self._open.pop(id(play)))

    def _judge(self, play: Play) -> None:
        env = play.env.unwrapped
        together = [play]
        if env.judges_groups:  # type: ignore[attr-defined]
            group = self._groups[id(play)]
            told = self._told.setdefault(id(group), [])
            told.append(play)
            if len(told) < len(group):
                return
            together = group
        before = self.calls.n_elsewhere
        replies = [(p.env.unwrapped, p.turns[-1].text, p.turns[-1].completion_ids) for p in together]
        with waiting(play.env, play.seed):
            together[0].env.unwrapped.judge_ahead(replies, self.calls)  # type: ignore[attr-defined]
        for p in together:
            if self.calls.n_elsewhere == before:
                self.take(p, _step(p))
            else:
                self._open[id(p)] = p, _step(p)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


def _step(play: Playing) -> Callable[[], Outcome]:
    return partial(advance, play.env, play.seed, play.turns[-1].text)
