"""Write report.html into the folder of a training run, also while it is going on, or of an evaluation:
`python scripts/report.py runs/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import rl_lora.scripts.signals

# isort: split
import rl_lora
from rl_lora.report.html import evaluation_page, lines, write
from rl_lora.report.training_page import training_page
from rl_lora.scripts.command import run
from rl_lora.system.files import FileError, read_json
from rl_lora.system.terminal import guard, say


def report(folder: Path, page: Path | None = None) -> None:
    """Write the page of a folder, by default into it. Raises ValueError where there is nothing to report of, FileError
    where the page cannot be written."""
    evaluation, page = folder / "results.json", page or folder / "report.html"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if evaluation.is_file():
        results = read_json(evaluation, "evaluate again")
        if not isinstance(results, dict) or results.get("kind") != "evaluation":
            raise ValueError(f"{evaluation} is not of an evaluation, or of an older one: evaluate again")
        html = evaluation_page(results, samples_by_row(results, lines(folder / "samples.jsonl")))
    else:
        html = training_page(folder)
    try:
        write(html, page)
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


class Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows all options")


def main() -> None:
    guard()
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="runs/NAME, or an evaluation's folder")
    parser.add_argument("--out", metavar="FILE", help="the page of one folder; by default report.html in it")
    parser.add_argument("--version", action="version", version=f"rl_lora {rl_lora.__version__}")

    def work() -> None:
        given = parser.parse_args()
        if given.out is not None and len(given.folders) > 1:
            raise ValueError(f"--out is for the page of one folder, got {len(given.folders)} folders")
        for folder in given.folders:
            report(Path(folder).expanduser(), None if given.out is None else Path(given.out).expanduser())

    sys.exit(run(work))


if __name__ == "__main__":
    main()
