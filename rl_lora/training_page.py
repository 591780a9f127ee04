"""The page of a training run, finished or not: its records as charts, held-out problems before and after.

Everything is read from the run's folder; `page.py` makes the page of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rl_lora.metrics import MetricsFile, Record
from rl_lora.page import Chart, browser, duration, facts, figure, flat, lines, point, render


class Drawn(NamedTuple):
    """A chart of a training run: the unit, and behind each line `train/` or `eval/` and a field of `metrics.jsonl`."""

    title: str
    unit: str
    lines: dict[str, str]
    note: str = ""


CHARTS = {
    "Outcome": [
        Drawn(
            "Accuracy",
            "percent",
            {"held out": "eval/accuracy", "sampled in training": "train/accuracy"},
            "Share of episodes that the environment calls solved; held out with 95 % intervals.",
        ),
        Drawn(
            "Reward",
            "number",
            {"held out": "eval/reward", "sampled in training": "train/reward"},
            "Mean over episodes.",
        ),
    ],
    "Learning": [
        Drawn(
            "Sampler against learner",
            "number",
            {"sampler_learner_kl": "train/sampler_learner_kl"},
            "Mean |log p_learner - log p_sampler| before a weight moves: near zero, or something is wrong.",
        ),
        Drawn("Entropy", "number", {"entropy": "train/entropy"}, "Nats a token, of the groups that were learned from."),
        Drawn(
            "Groups without signal",
            "percent",
            {"all rewards equal": "train/groups_without_signal", "all solved": "train/groups_solved"},
            "Groups whose rewards are all the same teach nothing.",
        ),
        Drawn("Gradient norm", "number", {"gradient": "train/grad_norm"}, "Before clipping."),
        Drawn("Step norm", "number", {"step": "train/step_norm"}, "How far a step moved A and B."),
        Drawn("Adapter norms", "number", {"A": "train/A_norm", "B": "train/B_norm"}, "Of all layers."),
        Drawn("Clipped", "percent", {"clipped": "train/clip_fraction"}, "Tokens whose ratio was clipped."),
        Drawn("Loss", "number", {"loss": "train/loss"}, "Mean over the tokens that were learned from."),
    ],
    "Episodes": [
        Drawn(
            "Length",
            "number",
            {"mean": "train/tokens_per_episode", "longest": "train/tokens_per_episode_max"},
            "Tokens of a sampled episode.",
        ),
        Drawn(
            "Cut off, unscorable",
            "percent",
            {"cut off": "train/truncated", "cut off, held out": "eval/truncated", "unscorable": "train/unscorable"},
            "Replies that reached max_tokens; episodes that could not be judged.",
        ),
    ],
    "Time": [
        Drawn(
            "Seconds",
            "number",
            {
                "sampling": "train/seconds/rollout",
                "learning": "train/seconds/learn",
                "evaluating": "eval/seconds/evaluate",
            },
            "Of each stage of a step, and of each evaluation.",
        ),
        Drawn(
            "Tokens per second",
            "number",
            {"sampled": "train/rollout_tokens_per_second", "learned from": "train/learn_tokens_per_second"},
        ),
    ],
}


def training_page(run_dir: str | Path) -> str:
    """The page of a training run, from what is in its folder so far.

    Raises:
        ValueError: there is no record of any step or evaluation.
    """
    run_dir = Path(run_dir)
    metrics, path = MetricsFile(run_dir / "metrics.jsonl"), run_dir / "config.yaml"
    train, evals = metrics.read("train"), metrics.read("eval")
    if not train and not evals:
        what = "has no records" if metrics.path.is_file() else "is not there"
        raise ValueError(f"{metrics.path} {what}: {run_dir} is not the folder of a run, or it has just begun")
    config: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {}
    step, steps = max(record["step"] for record in train + evals), config.get("steps")
    running = steps is not None and step < steps
    parts = sorted({name for record in train for name in record if name.startswith("parts/")})
    drawn = CHARTS | {"Outcome": [*CHARTS["Outcome"], *_parts(parts)]}
    charts = {title: [_chart(d, train, evals) for d in section] for title, section in drawn.items()}
    ends = {f"step {record['step']}": record for record in (evals[0], evals[-1])} if evals else {}
    names = list(ends)
    samples = (
        sample | {"adapter": name}
        for name in names
        for sample in lines(run_dir / "evals" / f"step-{ends[name]['step']:06d}.jsonl")
    )
    seconds = sum(value for r in train + evals for name, value in r.items() if name.startswith("seconds/"))
    return render(
        kind="Training run, not finished" if running else "Training run",
        title=run_dir.resolve().name,
        lede=facts(
            ("task", (config.get("env") or {}).get("id")),
            ("model", (config.get("model") or {}).get("name")),
            ("steps", f"{step} of {steps}" if running else step),
            ("time", duration(seconds)),
        ),
        headline=_headline(train, evals),
        sections=[
            {"title": title, "charts": kept}
            for title, section in charts.items()
            if (kept := [chart for chart in section if chart["series"]])
        ],
        table=None,
        matrix=None,
        browser=browser(samples, names, names[::-1] if len(names) > 1 else [], _change),
        config=flat(config),
    )


def _parts(names: Sequence[str]) -> list[Drawn]:
    if len(names) < 2:  # the reward itself
        return []
    fields = {name.removeprefix("parts/"): f"train/{name}" for name in names}
    return [Drawn("Parts of the reward", "number", fields, "As sampled, before they are weighed.")]


def _chart(drawn: Drawn, train: Sequence[Record], evals: Sequence[Record]) -> Chart:
    """Lines without any number are left out, and those of what never happened."""
    series = []
    for name, path in drawn.lines.items():
        kind, _, field = path.partition("/")
        points = [point(record["step"], record, field) for record in (train if kind == "train" else evals)]
        known = [value for _, value, *_ in points if value is not None]
        if any(known) or (known and field not in ("clip_fraction", "unscorable")):
            series.append({"name": name, "points": points})
    chart = {"title": drawn.title, "note": drawn.note, "unit": drawn.unit}
    return chart | {"kind": "line", "x": "step", "series": series, "reference": None}


def _change(problem: dict[str, Any]) -> int:
    """Newly solved first, then no longer solved, then answered otherwise."""
    before, after = (problem["samples"].get(row) for row in (0, 1))
    if not before or not after:
        return 3
    was, now = before[0].get("success"), after[0].get("success")
    if was is not now:
        return 0 if now else 1
    return 2 if before[0]["texts"] != after[0]["texts"] else 3


def _headline(train: Sequence[Record], evals: Sequence[Record]) -> list[dict[str, str]]:
    """Held out, before and now; or else the reward of the first and of the last step."""
    measure = "accuracy" if any(record.get("accuracy") is not None for record in evals) else "reward"
    known = [record for record in evals if record.get(measure) is not None]
    if known:
        ends = {record["step"]: record for record in (known[0], known[-1])}
        return [
            figure(f"held-out {measure}, {f'step {step}' if step else 'before training'}", record, measure)
            for step, record in ends.items()
        ]
    known = [record for record in train if record.get("reward") is not None]
    return [figure(f"sampled reward, step {r['step']}", r, "reward") for r in (known[0], known[-1])] if known else []
