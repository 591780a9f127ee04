"""How calls of reward functions are started: at once, unless a caller has another way; `async` ones in a loop of their
own, in a thread that lasts as long as the process, so that what they share (a client's connections) stays theirs."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Protocol


class Calls(Protocol):
    """Whoever starts calls, such as a rollout that decodes on meanwhile."""

    limit: int
    """How many may run at a time."""

    def start(self, key: object, call: Callable[[], Any]) -> Future[Any]:
        """Start a call; where it returns a Future, that one's result is meant. Calls of one `key` are alike: those of a
        key that is known to wait may run in threads. None: never in another thread."""
        ...


class AtOnce:
    """One call after another."""

    limit = 1

    def start(self, key: object, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            value = call()
            future.set_result(value.result() if isinstance(value, Future) else value)
        except (Exception, SystemExit) as error:
            future.set_exception(error)
        return future


def in_loop(awaitable: Awaitable[Any], limit: int) -> Future[Any]:
    """Await it in the loop, beside at most `limit` - 1 others that were given the same limit."""

    async def wait() -> Any:
        async with _turns(limit):
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:  # would end the loop, and every later call with it
                raise RuntimeError(f"it raised {type(error).__name__}: {error}") from error

    return asyncio.run_coroutine_threadsafe(wait(), _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


@functools.cache
def _turns(limit: int) -> asyncio.Semaphore:
    """Called in the loop only."""
    return asyncio.Semaphore(limit)
