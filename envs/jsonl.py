"""Files of rows, read once a process: JSON lines, a JSON array, CSV and Parquet, compressed or not.

Errors name file and line, or row.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rl_lora.system.plurals import counted


class Source(NamedTuple):
    """A file at one moment: a file that has changed since is another source."""

    path: str
    mtime_ns: int
    size: int


class DataRow(NamedTuple):
    line: int
    """Number of the line in a text file, else of the row; the first one is 1."""
    columns: dict[str, Any]
    place: str = ""
    """The file and the line of the row, for messages."""


def locate(path: str | os.PathLike[str]) -> Source:
    """The file at `path` as it is now. Raises ValueError if there is none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"a path to a file of rows is needed ({KINDS}), got {path!r}")
    file = Path(path).expanduser().resolve()
    try:
        stat = file.stat()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    if not file.is_file():
        raise ValueError(f"cannot read {file}: it is not a file")
    return Source(str(file), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def read_rows(source: Source) -> tuple[DataRow, ...]:
    """The rows of a file, in the format that its name ends in; any other name is taken for JSON lines. Text is UTF-8.
    All callers share the rows: do not change them.

    Raises:
        ValueError: naming file and line, if it cannot be read as that; naming the file, if it holds no row.
    """
    suffix = suffix_of(source.path)
    if suffix in UNREAD:
        raise ValueError(f"cannot read {source.path}: {suffix} files are not read here, but {KINDS}")
    try:
        content = Path(source.path).read_bytes()
        if source.path.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {source.path}: {getattr(error, 'strerror', None) or error}") from error
    rows = READERS.get(suffix, _json_lines)(content, source.path)
    if not rows:
        raise ValueError(f"{source.path} is empty: expected one JSON object a line, or {KINDS}")
    return tuple(rows)


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The ending that says what a file holds, without that of its compression."""
    return Path(os.fspath(path).removesuffix(".gz")).suffix.lower()


def _json_lines(content: bytes, path: str) -> list[DataRow]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(n, _parse(line, where := f"{path}, line {n}"), where))
    return rows


def _json(content: bytes, path: str) -> list[DataRow]:
    """An array of objects; or JSON lines, which are often called .json too."""
    text = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        return _json_lines(content, path)
    values = _parse(text, path)
    return [_row(n, value, f"{path}, row {n}") for n, value in enumerate(values, 1)]


def _row(n: int, value: Any, where: str) -> DataRow:
    if not isinstance(value, dict):
        hint = " (a file that is one JSON array is called .json)" if isinstance(value, list) else ""
        raise ValueError(f"{where}: expected a JSON object, got a {type(value).__name__}{hint}")
    return DataRow(n, value, where)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not JSON ({error.msg} at {at})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where}: not JSON that can be read ({error})") from error


def _separated(content: bytes, path: str, delimiter: str) -> list[DataRow]:
    """Columns named in the first line; all values are texts."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[DataRow] = []
    names: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            where, begin = f"{path}, line {begin}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = cells
                if len(set(names)) < len(names) or not all(names):
                    raise ValueError(f"{where}: the first line must name each column once, got {names}")
            elif len(cells) != len(names):
                n_cells, n_columns = counted(len(cells), "cell"), counted(len(names), "column")
                raise ValueError(f"{where}: {n_cells}, but {n_columns} ({', '.join(names)})")
            else:
                rows.append(DataRow(begin - 1, dict(zip(names, cells, strict=True)), where))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return rows


def _parquet(content: bytes, path: str) -> list[DataRow]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'rl_lora[data]'") from error
    try:
        values = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path} as Parquet: {error}") from error
    return [DataRow(n, value, f"{path}, row {n}") for n, value in enumerate(values, 1)]


READERS: dict[str, Callable[[bytes, str], list[DataRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
}
UNREAD = {".arrow", ".bz2", ".feather", ".pkl", ".pickle", ".xls", ".xlsx", ".xz", ".yaml", ".yml", ".zip", ".zst"}
KINDS = f"{', '.join(READERS)}, each also with .gz behind"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that comes twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found
