"""Calls of other people's code, environments and reward functions, while sampling goes on.

What computes runs in the main thread, one call after another: threads would not make it faster, and need not bear it.
What waits, for a network or another process, is handed to threads, as soon as its like have been seen to wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

WAITS, WAITS_LONG = 0.05, 1.0
"""Seconds off the processor: of two calls in a row, or of a single one, after which others of their kind run in
threads."""
FORGIVEN = 0.9
"""Factor of earlier waits after a call that has not waited: one pause means nothing, every fourth call does."""

MOSTLY = 4
"""A call has waited if it did so for this many times as long as it computed: on a busy machine computing waits too."""


class CallPool:
    """Starts calls, `limit` at a time at most; with a limit of 1 one after another.

    Where a call ran does not decide what it returns. Threads are daemons: a call that hangs does not keep a process
    that was interrupted.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.n_elsewhere = 0
        """Calls that did not end before `start` did."""
        self._waited: dict[object, float] = {}
        """Seconds of calls that have waited, by key; each counts half of WAITS_LONG at least."""
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._n_threads = self._n_open = 0
        self._lock = threading.Lock()

    def start(self, key: object, call: Callable[[], Any]) -> Future[Any]:
        """Start a call; where it returns a Future, that one's result is meant. What it raises, the Future does, but for
        KeyboardInterrupt. Calls of one `key` are alike; None: never in another thread."""
        future: Future[Any] = Future()
        if key is not None and self.limit > 1 and self._waited.get(key, 0.0) >= WAITS_LONG:
            self.n_elsewhere += 1
            with self._lock:
                self._n_open += 1
                more = self._n_threads < min(self.limit, self._n_open)
                self._n_threads += more
            if more:
                threading.Thread(target=self._work, name="rewards", daemon=True).start()
            self._tasks.put((future, call))
            return future
        begin, busy, pauses = time.perf_counter(), time.thread_time(), _pauses()
        try:
            value = call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the time-outs of some libraries are no Exceptions
            future.set_exception(error)
        else:
            if isinstance(value, Future):
                return self._elsewhere(value)
            future.set_result(value)
        seconds, busy = time.perf_counter() - begin, time.thread_time() - busy
        waited = seconds - busy
        self._note(key, waited if _pauses() != pauses and waited > MOSTLY * busy else 0.0)
        return future

    def _elsewhere(self, future: Future[Any]) -> Future[Any]:
        """A call that an event loop runs."""
        if self.limit == 1:
            future.exception()
        else:
            self.n_elsewhere += 1
        return future

    def _work(self) -> None:
        """Run calls, one after another: the target of a thread."""
        while True:
            future, call = self._tasks.get()
            value, raised = None, None
            try:
                value = call()
                value = value.result() if isinstance(value, Future) else value
            except BaseException as error:
                raised = error
            with self._lock:
                self._n_open -= 1
            if raised is None:
                future.set_result(value)
            else:
                future.set_exception(raised)
            del future, call, value, raised  # until there is more to do

    def _note(self, key: object, waited: float) -> None:
        if key is not None:
            before = self._waited.get(key, 0.0)
            self._waited[key] = before + max(waited, WAITS_LONG / 2) if waited > WAITS else before * FORGIVEN


def _pauses() -> float:
    """How often this thread has given up the processor by itself, which a thread that others displace does not. Where
    that is not counted, a number that changes."""
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return time.perf_counter()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
