"""The picture of several runs: what of them is read, what is drawn behind what, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from rl_lora.report.accuracy_plot import curve_of, draw, plot_accuracy


def a_run(folder: Path, accuracies: dict[int, float | None], init_from: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"adapter": {"init_from": init_from and str(init_from)}}))
    records = [{"kind": "train", "step": step, "reward": 0.5} for step in range(1, max(accuracies) + 1)]
    for step, accuracy in accuracies.items():
        interval = {} if accuracy is None else {"accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.2}
        records.append({"kind": "eval", "step": step, "accuracy": accuracy, **interval})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_is_drawn_behind_those_it_goes_on_from(tmp_path: Path) -> None:
    first = a_run(tmp_path / "first", {0: 0.1, 8: 0.4})
    second = a_run(tmp_path / "second", {0: 0.4, 5: 0.5}, first / "adapter")
    third = a_run(tmp_path / "third", {0: 0.5, 3: 0.7}, second / "adapter")
    assert [curve_of(folder).start for folder in (first, second, third)] == [0, 8, 13]
    branch = a_run(tmp_path / "branch", {0: 0.4, 5: 0.3}, first / "adapter")
    elsewhere = a_run(tmp_path / "elsewhere", {0: 0.2}, tmp_path / "gone" / "adapter")
    assert curve_of(elsewhere).start == 0
    lines = styles(draw([curve_of(folder) for folder in (first, elsewhere, second, third, branch)]))
    assert len({lines[name] for name in ("first", "second", "third")}) == 1
    assert len({color for color, _ in lines.values()}) == 2
    assert lines["branch"][0] == lines["second"][0]
    assert lines["branch"][1] != lines["second"][1]


def styles(figure: Figure) -> dict[str, tuple[str, str]]:
    """Color and dashes of each run's line."""
    bars = [bars for bars in figure.axes[0].containers if isinstance(bars, ErrorbarContainer)]
    lines = {str(bar.get_label()): bar.lines[0] for bar in bars}
    return {name: (str(line.get_color()), str(line.get_linestyle())) for name, line in lines.items() if line}


def test_the_picture_has_every_point_with_its_interval(tmp_path: Path) -> None:
    first = a_run(tmp_path / "first", {0: 0.1, 4: None, 8: 0.4})
    second = a_run(tmp_path / "second", {0: 0.4, 5: 0.5}, first / "adapter")
    out = tmp_path / "curve.png"
    plot_accuracy([str(first), str(second)], str(out))
    assert out.read_bytes().startswith(b"\x89PNG")

    [axes] = draw([curve_of(first), curve_of(second)]).axes
    drawn = {bars.get_label(): bars.lines for bars in axes.containers if isinstance(bars, ErrorbarContainer)}
    points = {name: np.asarray(line.get_xydata()).tolist() for name, (line, _, _) in drawn.items() if line}
    assert points == {"first": [[0, 0.1], [8, 0.4]], "second": [[8, 0.4], [13, 0.5]]}
    intervals = np.asarray(drawn["second"][2][0].get_segments())[:, :, 1]
    assert intervals.tolist() == [pytest.approx([0.3, 0.6]), pytest.approx([0.4, 0.7])]


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the folders of runs"):
        plot_accuracy([], "x.png")
    with pytest.raises(ValueError, match=r"absent is not the folder of a run .*metrics\.jsonl is not there"):
        plot_accuracy([str(tmp_path / "absent")], "x.png")
    with pytest.raises(ValueError, match="none, which holds no accuracy: its environment gives no verdicts"):
        plot_accuracy([str(a_run(tmp_path / "none", {0: None}))], "x.png")
    folder = a_run(tmp_path / "a", {0: 0.5})
    with pytest.raises(ValueError, match="cannot write"):
        plot_accuracy([str(folder)], str(tmp_path / "nowhere" / "x.png"))
    with pytest.raises(ValueError, match="txt"):
        plot_accuracy([str(folder)], str(tmp_path / "x.txt"))
