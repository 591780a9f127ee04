"""Signals that wait: what must not be cut in the middle is done to its end first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def later() -> Iterator[Callable[[], None]]:
    """Yields a function `hold`: from its first call on, Ctrl-C, SIGTERM and SIGHUP wait for the end of the block. A
    second one does not. Elsewhere than in the main thread, where signals are not handled, nothing changes."""
    before: dict[int, Any] = {}
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if number != signal.SIGHUP:  # which comes twice
            restore()

    def hold() -> None:
        if not before and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as `nohup` has it
                before[number] = signal.signal(number, note)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    try:
        yield hold
    finally:
        restore()
        if waiting:
            signal.raise_signal(waiting[0])
