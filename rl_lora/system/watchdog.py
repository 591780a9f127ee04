"""Says what a program waits for when it takes long: a call into a user's code that hangs, a lock that another holds."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rl_lora.system.terminal import visible
from rl_lora.system.user_code import is_core, user_lines

PATIENCE = 60.0
"""Seconds until a call is named."""
AGAIN = (1, 5, 10)
"""Multiples of its patience at which it is named; then every ten of them."""
LOOK = 1.0
"""Seconds between two looks."""


@dataclass(eq=False)
class Wait:
    """Something that is waited for. `what` is the message, up to "for 60 s"."""

    what: Callable[[], str] | str
    patience: float
    thread: int = field(default_factory=threading.get_ident)
    begin: float = field(default_factory=time.monotonic)
    n_said: int = 0

    @property
    def due(self) -> float:
        times = AGAIN[self.n_said] if self.n_said < len(AGAIN) else AGAIN[-1] * (self.n_said - len(AGAIN) + 2)
        return self.begin + self.patience * times


_waits: set[Wait] = set()
_lock = threading.Lock()
_watcher: threading.Thread | None = None


@contextmanager
def watched(what: Callable[[], str] | str, patience: float | None = None) -> Iterator[None]:
    """While the block runs: after `patience` seconds (60), and now and then from there on, a line on standard error
    says what has not come to an end, and in which line of code."""
    global _watcher
    wait = Wait(what, PATIENCE if patience is None else patience)
    _waits.add(wait)
    if _watcher is None or not _watcher.is_alive():  # a forked process has none
        with _lock:
            if _watcher is None or not _watcher.is_alive():
                _watcher = threading.Thread(target=_watch, name="watch", daemon=True)
                _watcher.start()
    try:
        yield
    finally:
        _waits.discard(wait)


def _watch() -> None:
    while True:
        time.sleep(LOOK)
        now = time.monotonic()
        for wait in list(_waits):
            if now >= wait.due:
                wait.n_said += 1
                say(wait, now - wait.begin)


def say(wait: Wait, seconds: float) -> None:
    """One line on standard error."""
    what = wait.what if isinstance(wait.what, str) else wait.what()
    frame = sys._current_frames().get(wait.thread)
    inside: list[traceback.FrameSummary] = []
    for each in traceback.extract_stack(frame):  # what is under way since this package called it
        inside = [] if is_core(Path(each.filename)) else [*inside, each]
    lines = user_lines(inside)
    place = f" ({lines[-1].filename}, line {lines[-1].lineno}, in {lines[-1].name})" if lines else ""
    print(visible(f"{what} for {seconds:.0f} s{place}"), file=sys.stderr, flush=True)
