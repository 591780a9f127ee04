"""The steps of environments during a rollout: slow ones run while the sampler goes on.

An environment that ends with its first reply is told it at once, and asked for what came of it when nothing is sampled
any more. Where a next turn depends on it, steps that wait run at the same time while the other episodes are decoded,
and an episode goes on as soon as its own step is done. Which episodes are decoded together, and with it the rounding,
then depends on how long steps take; with `EpisodeConfig.wait_for_steps` it does not: decoding waits for them.

Of an environment are used, where it has them:
`one_reply`: its episodes end with their first reply.
`judge_ahead(replies, calls)`: begins to judge replies, (copy of the environment, text, tokens), which `step` waits for.
`judges_groups`: it wants all replies to a problem together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Generic, Protocol, TypeVar

from rl_lora.config import EpisodeConfig
from rl_lora.rollout.calls import CallPool
from rl_lora.rollout.contract import Env, StepResult, step_env, watch_step
from rl_lora.sampler.protocol import Later, Request
from rl_lora.types import Stop, Turn


class RunningEpisode(Protocol):
    """An episode in the making."""

    env: Env
    seed: int
    turns: list[Turn]
    stop: Stop | None


Play = TypeVar("Play", bound=RunningEpisode)


class Steps(Generic[Play]):
    """The steps of the episodes that are played together, by group.

    Args:
        take: writes down the outcome of an episode's last reply, which the function gives or raises TaskError for.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Play]],
        calls: CallPool,
        config: EpisodeConfig,
        take: Callable[[Play, Callable[[], StepResult]], None],
    ):
        self.calls, self.config, self.take = calls, config, take
        self.seconds = 0.0
        """Seconds that sampling has waited for steps."""
        playing = [[play for play in group if play.stop is None] for group in groups]
        self._groups = {id(play): group for group in playing for play in group}
        self._told: dict[int, list[Play]] = {}
        self._open: dict[int, tuple[Play, Callable[[], StepResult]]] = {}
        self._running: set[Future[StepResult]] = set()
        """Steps on which next turns depend."""

    def reply(self, play: Play, then: Callable[[], Request | None]) -> Request | Later | None:
        """Give an episode's last reply to its environment. `then`: the next request, once the step is taken."""
        with self._watch():
            if hasattr(play.env.unwrapped, "judge_ahead"):
                self._judge(play)
                return None
            future = self.calls.start(type(play.env.unwrapped), _step(play))
            if future.done():
                self.take(play, future.result)
                return then()
        if self.config.max_turns == 1 or getattr(play.env.unwrapped, "one_reply", False):
            self._open[id(play)] = play, future.result
            return None
        self._running.add(future)

        def request() -> Request | None:
            with self._watch():
                self.take(play, future.result)
            self._running.remove(future)
            return then()

        return Later((lambda: True) if self.config.wait_for_steps else future.done, request, self._wait)

    def _wait(self) -> None:
        """Wait until one of the steps is done on which next turns depend."""
        with self._watch():
            wait(self._running, return_when=FIRST_COMPLETED)

    def finish(self, plays: Sequence[Play]) -> None:
        """Wait for the steps that are still open, in the order of the episodes; called when all is sampled."""
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
        with watch_step(play.env, play.seed):
            together[0].env.unwrapped.judge_ahead(replies, self.calls)  # type: ignore[attr-defined]
        judged_elsewhere = self.calls.n_elsewhere > before
        for p in together:
            if judged_elsewhere:
                self._open[id(p)] = p, _step(p)
                continue
            future = self.calls.start(type(p.env.unwrapped), _step(p))  # it may have, or be wrapped in, a slow step
            if future.done():
                self.take(p, future.result)
            else:
                self._open[id(p)] = p, future.result

    @contextmanager
    def _watch(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


def _step(play: RunningEpisode) -> Callable[[], StepResult]:
    return partial(step_env, play.env, play.seed, play.turns[-1].text)
