"""Write report.html into the folder of a training run, also while it is going on, or of an evaluation:
`python scripts/report.py runs/NAME`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import scripts.signals  # noqa: F401  first: the other imports take seconds

# isort: split
from rl_lora.page import evaluation_page, lines, write
from rl_lora.training_page import training_page
from scripts.command import run


def report(folder: Path) -> None:
    """Raises ValueError where there is nothing to report of."""
    evaluation, page = folder / "results.json", folder / "report.html"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if evaluation.is_file():
        results = json.loads(evaluation.read_text())
        if results.get("kind") != "evaluation":
            raise ValueError(f"{evaluation} is not of an evaluation, or of an older one: evaluate again")
        write(evaluation_page(results, samples_by_row(results, lines(folder / "samples.jsonl"))), page)
    else:
        write(training_page(folder), page)
    print(page)


def samples_by_row(results: dict[str, Any], samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples under the names that the rows have now: rows with the same weights share theirs."""
    rows_of: dict[str, list[str]] = {}
    for name, weights in results["hashes"]["adapters"].items():
        rows_of.setdefault(weights, []).append(name)
    for sample in samples:
        for name in rows_of[sample["adapter_hash"]]:
            yield sample | {"adapter": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs/NAME, or an evaluation's folder")
    folders = parser.parse_args().folders

    def work() -> None:
        for folder in folders:
            report(folder)

    sys.exit(run(work))


if __name__ == "__main__":
    main()
