"""reward.png: the reward and the held-out accuracy of one run over its steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rl_lora.metrics.records import Record
from rl_lora.system import files


def plot_rewards(train: Sequence[Record], evals: Sequence[Record], path: Path) -> None:
    """Mean reward of the sampled episodes, and held-out accuracy with its 95 % interval, over steps.

    Colours as on the run's page: held-out figures are blue, figures of sampled episodes orange.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(record["step"], record["reward"]) for record in train if record["reward"] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="tab:orange", alpha=0.8, label="mean reward in training")
    checked = [record for record in evals if record["accuracy"] is not None]
    if checked:
        accuracy = [record["accuracy"] for record in checked]
        low = [max(0.0, record["accuracy"] - record.get("accuracy_low", record["accuracy"])) for record in checked]
        high = [max(0.0, record.get("accuracy_high", record["accuracy"]) - record["accuracy"]) for record in checked]
        steps = [record["step"] for record in checked]
        label = "held-out accuracy (95 % interval)"
        axes.errorbar(steps, accuracy, [low, high], fmt="o-", color="tab:blue", capsize=3, label=label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    if points or checked:
        axes.legend(loc="best")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    files.write_bytes(path, image.getbuffer())
