"""Held-out accuracy of several runs in one picture.

It is drawn from the files of the runs alone. A run that starts from another run's adapter is drawn to the right of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rl_lora.metrics.records import MetricsFile, Record
from rl_lora.system.terminal import say

DASHES = ("-", "--", "-.")


@dataclass(frozen=True)
class Curve:
    """One run's evaluations."""

    folder: Path
    before: tuple[Path, ...]
    """The runs that it goes on from, the nearest first."""
    evals: list[Record]

    @property
    def start(self) -> int:
        """Steps of all the runs before this one."""
        return sum(map(steps_of, self.before))

    @property
    def root(self) -> Path:
        """The first run of the chain."""
        return (self.folder, *self.before)[-1].resolve()


def plot_accuracy(runs: list[str], out: str) -> None:
    """Read the runs, write the picture and name it. Raises ValueError where there is nothing to draw."""
    if not runs:
        raise ValueError("name the folders of runs, such as runs/a runs/b")
    figure = draw([curve_of(Path(path)) for path in runs])
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error}") from error
    say(out)


def curve_of(folder: Path) -> Curve:
    """The evaluations of a run folder. Raises ValueError if there are none with an accuracy."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    if not metrics.path.is_file():
        raise ValueError(f"{folder} is not the folder of a run (--run_dir): {metrics.path.name} is not there")
    records = [record for record in metrics.read("eval") if record["accuracy"] is not None]
    if not records:
        why = "no evaluation yet" if not metrics.read("eval") else "no accuracy: its environment gives no verdicts"
        raise ValueError(f"there is nothing to draw of {folder}, which holds {why}")
    before: list[Path] = []
    while (parent := parent_of(before[-1] if before else folder)) is not None:
        before.append(parent)
    return Curve(folder, tuple(before), records)


def parent_of(folder: Path) -> Path | None:
    """The run that this one starts from, if its folder is there."""
    path = folder / "config.yaml"
    init_from = yaml.safe_load(path.read_text(encoding="utf-8"))["adapter"]["init_from"] if path.is_file() else None
    parent = Path(init_from).parent if init_from else None
    return parent if parent and (parent / "metrics.jsonl").is_file() else None


def steps_of(folder: Path) -> int:
    """The last step of a run."""
    return max((record["step"] for record in MetricsFile(folder / "metrics.jsonl").read()), default=0)


def draw(curves: list[Curve]) -> Figure:
    """One line a run, with error bars.

    Runs with the same first run share a color, and runs with the same predecessor differ in their dashes. A dotted
    line stands where a run starts from another.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for start in sorted({curve.start for curve in curves} - {0}):
        axes.axvline(start, color="gray", linestyle=":")
    colors: dict[Path, str] = {}
    branches: Counter[tuple[Path, int]] = Counter()
    for curve in curves:
        color = colors.setdefault(curve.root, f"C{len(colors)}")
        dashes = DASHES[branches[curve.root, curve.start] % len(DASHES)]
        branches[curve.root, curve.start] += 1
        accuracy = [record["accuracy"] for record in curve.evals]
        errors = [
            [max(0.0, a - record.get("accuracy_low", a)) for a, record in zip(accuracy, curve.evals, strict=True)],
            [max(0.0, record.get("accuracy_high", a) - a) for a, record in zip(accuracy, curve.evals, strict=True)],
        ]
        steps = [curve.start + record["step"] for record in curve.evals]
        axes.errorbar(
            steps,
            accuracy,
            errors,
            color=color,
            linestyle=dashes,
            marker="o" if dashes == "-" else "s",
            markersize=4,
            capsize=3,
            label=curve.folder.name,
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("held-out accuracy (95 % interval)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure
