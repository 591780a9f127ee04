"""The page of a folder: of a training run, also while it is going on, or of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rl_lora.report.evaluation_page import evaluation_page
from rl_lora.report.training_page import training_page
from rl_lora.system.files import FileError, read_json, read_json_lines, write_text
from rl_lora.system.terminal import say


def write_reports(folders: list[str], out: str | None = None) -> None:
    """Write the page of each folder into it, or the page of one folder to `out`, and print the paths.

    Raises:
        ValueError: there is nothing to report of, or several pages for one file.
        FileError: a page cannot be written.
    """
    if not folders:
        raise ValueError("name the folders of runs or evaluations, such as runs/first")
    if out is not None and len(folders) > 1:
        raise ValueError(f"--out is for the page of one folder, got {len(folders)} folders")
    for folder in folders:
        write_report(Path(folder), None if out is None else Path(out))


def write_report(folder: Path, page: Path | None = None) -> None:
    """Write the page of a folder, by default into it. Raises ValueError where there is nothing to report of, FileError
    where the page cannot be written."""
    evaluation, page = folder / "results.json", page or folder / "report.html"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if evaluation.is_file():
        results = read_json(evaluation, "evaluate again")
        if not isinstance(results, dict) or results.get("kind") != "evaluation":
            raise ValueError(f"{evaluation} holds no evaluation, or one of an older version: evaluate again")
        html = evaluation_page(results, samples_by_row(results, read_json_lines(folder / "samples.jsonl")))
    else:
        html = training_page(folder)
    try:
        write_text(page, html)
    except FileError as error:
        raise FileError(f"{error}; --out FILE writes the page elsewhere") from error
    say(page)


def samples_by_row(results: dict[str, Any], samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples under the names that the rows have now: rows with the same weights share theirs."""
    rows_of: dict[str, list[str]] = {}
    for name, weights in results["hashes"]["adapters"].items():
        rows_of.setdefault(weights, []).append(name)
    for sample in samples:
        for name in rows_of[sample["adapter_hash"]]:
            yield sample | {"adapter": name}
