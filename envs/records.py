"""Rows of a data set, from wherever it is: a file, a folder, a data set of the Hugging Face hub, or rows in memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rl_lora.envs.jsonl import KINDS, READERS, UNREAD, DataRow, locate, read_rows, suffix_of

SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` of `datasets` leaves in its folder, of several splits and of one."""
KEPT: dict[int, tuple[Any, int, tuple[DataRow, ...]]] = {}
"""Rows made of what was given in Python, by its id: many copies of an environment are made of the same."""
MAX_KEPT = 8
NEEDED = f"a path to a JSONL file is needed (or {KINDS}, the id of a data set on the hub, or rows), got {{!r}}"


def read_records(data: Any, split: str = "train", name: str | None = None) -> tuple[DataRow, ...]:
    """Rows of a file or of what is given in Python (which have no splits), or of a split of what the library `datasets`
    knows as `data`: a data set of the hub and its configuration `name`, a folder of files, or one that `save_to_disk`
    wrote.

    All callers share the rows: do not change them.

    Raises:
        ValueError: no such file or data set, a row that cannot be read, a library that is missing.
    """
    if not isinstance(data, str | os.PathLike):
        return given_rows(data)
    if not os.fspath(data):
        raise ValueError(NEEDED.format(data))
    if is_file(data):
        return read_rows(locate(data))
    path = Path(data).expanduser()
    if path.is_dir() and not _holds_data(path):
        raise ValueError(f"cannot read {path.resolve()}: it is not a file, and the folder holds none of {KINDS}")
    return _read_datasets(str(path) if path.is_dir() else os.fspath(data), split, name)


def is_file(data: str | os.PathLike[str]) -> bool:
    """Whether `data` means a file, there or not, and nothing that the library `datasets` knows."""
    path = Path(data).expanduser()
    return not path.is_dir() and (suffix_of(path) in {*READERS, *UNREAD} or path.suffix == ".gz" or path.is_file())


def given_rows(data: Any) -> tuple[DataRow, ...]:
    """Rows given in Python: a list of dicts, a data set of `datasets`, a table of pandas or pyarrow, any iterable of
    dicts. Raises ValueError if they are something else."""
    key, size = id(data), len(data) if hasattr(data, "__len__") else -1
    if key not in KEPT or KEPT[key][0] is not data or KEPT[key][1] != size:
        while len(KEPT) >= MAX_KEPT:
            KEPT.pop(next(iter(KEPT)))
        KEPT[key] = data, size, _rows(_listed(data), "the data")
    return KEPT[key][2]


def _listed(data: Any) -> list[Any]:
    for method, arguments in (("to_pylist", ()), ("to_list", ()), ("to_dict", ("records",))):
        if hasattr(data, method) and not isinstance(data, list | tuple | Mapping):
            try:
                return list(getattr(data, method)(*arguments))
            except Exception:  # a method of the same name that means something else
                continue
    if data is None:
        raise ValueError(NEEDED.format(data))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        splits = f" with the keys {', '.join(map(str, data))}: choose one" if isinstance(data, Mapping) else ""
        raise ValueError(f"data must be a path or rows, a list of dicts, got a {type(data).__name__}{splits}")
    return list(data)


def _holds_data(folder: Path) -> bool:
    inside = [path for place in (folder, folder / "data") if place.is_dir() for path in place.iterdir()]
    return any(path.name in SAVED or suffix_of(path) in READERS for path in inside)


@functools.lru_cache(maxsize=8)
def _read_datasets(data: str, split: str, name: str | None) -> tuple[DataRow, ...]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{data!r} is no file that is there, and reading it as a data set of the Hugging Face hub needs datasets: "
            "pip install 'rl_lora[data]'"
        ) from error
    try:
        if saved := [file for file in SAVED if (Path(data) / file).is_file()]:
            found = datasets.load_from_disk(data)
            found = found[split] if saved[0] == SAVED[0] else found
        else:
            found = datasets.load_dataset(data, name, split=split)
        rows: list[dict[str, Any]] = found.to_list()
    except Exception as error:  # of many kinds: the network, the hub, the builder
        known = f"{data}, configuration {name}" if name else data
        known += ", which is a folder, not a file" if Path(data).is_dir() else ""
        raise ValueError(
            f"cannot read split {split!r} of the data set {known}: {type(error).__name__}: {error}; a local file "
            f"({KINDS}) can take its place"
        ) from error
    return _rows(rows, f"{data}, split {split}")


def _rows(rows: list[Any], where: str) -> tuple[DataRow, ...]:
    if not rows:
        raise ValueError(f"{where} holds no row")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise ValueError(f"{where}, row {n}: a row must be a dict of columns and their values, got {row!r:.200}")
    return tuple(DataRow(n, dict(row), f"{where}, row {n}") for n, row in enumerate(rows, 1))
