"""Text for a terminal, free of control characters, whether a model, a data set, a file name or an exception holds them,
and of characters that the terminal's encoding lacks.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0 but for tabs and new lines, DEL, C1), changes of direction, line separators, halves of
surrogate pairs."""


def visible(text: str) -> str:
    """A text whose control characters are written out, as in `\\x1b[31m`; new lines and tabs stay."""
    return UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def in_line(text: object) -> str:
    """A name, path or message in one line."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


class Terminal(Console):
    """A console that sends the terminal no commands from the texts it prints: markup is off unless asked for, and
    control characters and characters that the encoding lacks are written out."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"highlight": False, "soft_wrap": True, "emoji": False, "markup": False} | kwargs)

    def print(self, *objects: Any, **kwargs: Any) -> None:
        super().print(*(visible(x) if isinstance(x, str) else x for x in objects), **kwargs)  # rich drops some of them

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                text = visible(segment.text).encode(self.encoding, "backslashreplace").decode(self.encoding)
                yield segment if text == segment.text else Segment(text, segment.style)


def say(text: object) -> None:
    """A line on standard output, as it is."""
    Terminal().print(str(text))


class Lasting(io.FileIO):
    """A standard stream whose loss ends nothing: a terminal that was closed, a pipe that nobody reads, a full disk.
    What is printed from then on goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def _lasting(stream: TextIO) -> TextIO:
    stream.flush()
    raw = Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, line_buffering=bool(stream.line_buffering))


def guard() -> None:
    """Prepare the streams of a command: characters that the encoding lacks are written out, also in tracebacks and
    warnings, and a terminal that is gone ends no run."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is getattr(sys, f"__{name}__") and stream is not None:
            setattr(sys, name, _lasting(stream))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))

    def formatwarning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        return visible(plain(message, category, *args, **kwargs))

    plain = warnings.formatwarning
    sys.excepthook, warnings.formatwarning = excepthook, formatwarning
