"""JSONL files read once a process, with errors that name the line."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """A file at one moment: a file that has changed since is another source."""

    path: str
    mtime_ns: int
    size: int


class Row(NamedTuple):
    line: int
    """Counted from 1."""
    columns: dict[str, Any]


def locate(path: str | os.PathLike[str]) -> Source:
    """The file at `path` as it is now. Raises ValueError if there is none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"a path to a JSONL file is needed, got {path!r}")
    file = Path(path).expanduser().resolve()
    try:
        stat = file.stat()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    if not file.is_file():
        raise ValueError(f"cannot read {file}: it is not a file")
    return Source(str(file), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def read_rows(source: Source) -> tuple[Row, ...]:
    """One JSON object a line, in UTF-8; blank lines are skipped. All callers share the rows: do not change them.

    Raises:
        ValueError: naming file and line, if a line is not a JSON object; naming the file, if it holds no row.
    """
    try:
        lines = Path(source.path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {source.path}: {error.strerror}") from error
    rows = tuple(Row(n, _parse(line, f"{source.path}, line {n}")) for n, line in enumerate(lines, 1) if line.strip())
    if not rows:
        raise ValueError(f"{source.path} is empty: expected one JSON object a line")
    return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where}: not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value
