"""Ctrl-C, SIGTERM and SIGHUP, as every command takes them: they end it in good order, the second time at once.

Imported before the libraries that take seconds to import, in which Ctrl-C ends the command without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from rl_lora.system.invocation import COMMAND, PACKAGE, UNDER_LAUNCHER

SAME_PRESS = 2.0
"""Seconds within which a launcher hands on what the terminal has told all processes: no second Ctrl-C."""
GRACE = 30.0
"""Seconds that a process has to end in good order."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP, which comes where a terminal is closed."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def listen() -> None:
    """Raise KeyboardInterrupt at Ctrl-C and Terminated at SIGTERM, and at SIGHUP unless `nohup` has it ignored. Under a
    launcher, end when it is gone.

    Only in a program that is a command: one that merely calls its `main` has signals of its own.
    """
    if not _is_command() or threading.current_thread() is not threading.main_thread():
        return
    came: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and came:
            return  # the shell and the system each send one
        if came and not (UNDER_LAUNCHER and time.monotonic() - came[0] < SAME_PRESS):
            os._exit(128 + number)
        if not came:
            came.append(time.monotonic())
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
    if UNDER_LAUNCHER:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(launcher: int) -> None:
    """A process whose launcher was killed waits for the others for ever, and keeps a core busy."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def ended_by(error: KeyboardInterrupt) -> int:
    """The exit code of a command that a signal has ended. It ends, whatever its threads still wait for."""
    code = 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)

    def end() -> None:
        time.sleep(GRACE / 3)
        os._exit(code)

    if _is_command():
        threading.Thread(target=end, daemon=True).start()
    return code


def _is_command() -> bool:
    """Whether this program is one of ours, and has not just imported it."""
    main = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
    scripts = Path(__file__).parent.resolve()
    return main.is_relative_to(scripts) or main == PACKAGE / "__main__.py" or main.stem == COMMAND


def _quietly(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if _is_command():
    signal.signal(signal.SIGINT, _quietly)
