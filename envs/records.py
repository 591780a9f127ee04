"""Rows of a data set, from wherever it is: a JSONL or Parquet file, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from envs.jsonl import Row, Source, locate, read_rows

FILES = (".jsonl", ".json", ".parquet")


def read_records(data: str, split: str = "train", name: str | None = None) -> tuple[Row, ...]:
    """Rows of a file (which has no splits), or of a split of what the library `datasets` knows as `data`: a data set of
    the hub and its configuration `name`, a folder of files, or one that `save_to_disk` wrote.

    All callers share the rows: do not change them.

    Raises:
        ValueError: no such file or data set, a row that cannot be read, a library that is missing.
    """
    path = Path(data).expanduser()
    if is_file(data):
        source = locate(data)
        return _read_parquet(source) if path.suffix == ".parquet" else read_rows(source)
    return _read_datasets(str(path) if path.is_dir() else data, split, name)


def is_file(data: str) -> bool:
    """Whether `data` means a file, there or not, and nothing that the library `datasets` knows."""
    path = Path(data).expanduser()
    return path.suffix in FILES or path.is_file()


@functools.lru_cache(maxsize=8)
def _read_parquet(source: Source) -> tuple[Row, ...]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {source.path} needs pyarrow: pip install 'rl_lora[data]'") from error
    try:
        rows = pyarrow.parquet.read_table(source.path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {source.path} as Parquet: {error}") from error
    return _rows(rows, source.path)


@functools.lru_cache(maxsize=8)
def _read_datasets(data: str, split: str, name: str | None) -> tuple[Row, ...]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{data!r} is no file that is there, and reading it as a data set of the Hugging Face hub needs datasets: "
            "pip install 'rl_lora[data]'"
        ) from error
    try:
        if saved := [file for file in ("dataset_dict.json", "state.json") if (Path(data) / file).is_file()]:
            found = datasets.load_from_disk(data)
            found = found[split] if saved[0] == "dataset_dict.json" else found
        else:
            found = datasets.load_dataset(data, name, split=split)
        rows: list[dict[str, Any]] = found.to_list()
    except Exception as error:  # of many kinds: the network, the hub, the builder
        known = f"{data}, configuration {name}" if name else data
        raise ValueError(
            f"cannot read split {split!r} of the data set {known}: {type(error).__name__}: {error}; a local file "
            "(.jsonl, .parquet) can take its place"
        ) from error
    return _rows(rows, f"{data}, split {split}")


def _rows(rows: list[dict[str, Any]], where: str) -> tuple[Row, ...]:
    if not rows:
        raise ValueError(f"{where} holds no row")
    return tuple(Row(n, row) for n, row in enumerate(rows, 1))
