"""The page of a training run, finished or not: its records as charts, held-out problems before and after.

Everything is read from the run's folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_lora.config import TrainConfig
from rl_lora.metrics.collapse import run_warnings
from rl_lora.metrics.records import MetricsFile, Record
from rl_lora.metrics.samples import Sample
from rl_lora.metrics.summary import change
from rl_lora.report.formats import duration, p_equation, points, signed
from rl_lora.report.html import Chart, headline_figure, known_facts, point, render, sample_browser, setting_texts
from rl_lora.report.run_samples import read_held_out, read_samples, stored_steps
from rl_lora.system.files import read_yaml
from rl_lora.system.plurals import counted

HELD_OUT, SAMPLED, LEARNED, FURTHER = range(4)
"""Numbers of the colours in page.css: held-out figures, figures of sampled episodes, figures of the learner, and the
first of the colours for further lines of the same kind."""
SAMPLED_FIELDS = {
    "reward",
    "accuracy",
    "truncated",
    "unscorable",
    "tokens_per_episode",
    "tokens_per_episode_max",
    "groups_without_signal",
    "groups_solved",
    "seconds/rollout",
    "rollout_tokens_per_second",
}
MAX_SAMPLED_CHARS = 4_000_000
"""Text of training samples on a page; of more, fewer steps are shown."""


class ChartSpec(NamedTuple):
    """A chart of a training run. `lines`: the name of each, and `train/` or `eval/` with a field of metrics.jsonl."""

    title: str
    unit: str
    lines: dict[str, str]
    note: str = ""


CHARTS = {
    "Outcome": [
        ChartSpec(
            "Accuracy",
            "percent",
            {"held out": "eval/accuracy", "sampled in training": "train/accuracy"},
            "Share of episodes that the environment calls solved; held out with 95 % intervals.",
        ),
        ChartSpec(
            "Reward",
            "number",
            {"held out": "eval/reward", "sampled in training": "train/reward"},
            "Mean over episodes.",
        ),
    ],
    "Learning": [
        ChartSpec(
            "Sampler against learner",
            "number",
            {"sampler_learner_kl": "train/sampler_learner_kl"},
            "Mean |log p_learner - log p_sampler| before a weight moves: near zero, or something is wrong.",
        ),
        ChartSpec("Entropy", "number", {"entropy": "train/entropy"}, "Nats a token of the groups learned from."),
        ChartSpec(
            "Groups without signal",
            "percent",
            {"all rewards equal": "train/groups_without_signal", "all solved": "train/groups_solved"},
            "Groups whose rewards are all the same teach nothing.",
        ),
        ChartSpec("Gradient norm", "number", {"gradient": "train/grad_norm"}, "Norm of the gradient before clipping."),
        ChartSpec("Step norm", "number", {"step": "train/step_norm"}, "Norm of a step's change of A and B."),
        ChartSpec(
            "Adapter norms",
            "number",
            {"A": "train/A_norm", "B": "train/B_norm"},
            "Norms over all layers.",
        ),
        ChartSpec("Clipped", "percent", {"clipped": "train/clip_fraction"}, "Share of tokens whose ratio was clipped."),
        ChartSpec("Loss", "number", {"loss": "train/loss"}, "Mean over the tokens learned from."),
    ],
    "Episodes": [
        ChartSpec(
            "Length",
            "number",
            {"mean": "train/tokens_per_episode", "longest": "train/tokens_per_episode_max"},
            "Tokens of a sampled episode.",
        ),
        ChartSpec(
            "Cut off, unscorable",
            "percent",
            {"cut off": "train/truncated", "cut off, held out": "eval/truncated", "unscorable": "train/unscorable"},
            "Replies that reached max_tokens; episodes that could not be judged.",
        ),
    ],
    "Time": [
        ChartSpec(
            "Seconds",
            "number",
            {
                "sampling": "train/seconds/rollout",
                "learning": "train/seconds/learn",
                "evaluating": "eval/seconds/evaluate",
                "waiting for rewards": "train/seconds/reward",
            },
            "Seconds of each stage of a step, and of each evaluation.",
        ),
        ChartSpec(
            "Tokens per second",
            "number",
            {"sampled": "train/rollout_tokens_per_second", "learned from": "train/learn_tokens_per_second"},
        ),
    ],
}


def training_page(run_dir: str | Path) -> str:
    """The page of a training run, from the files in its folder so far.

    Raises:
        ValueError: there is no record of any step or evaluation.
    """
    run_dir = Path(run_dir)
    metrics, path = MetricsFile(run_dir / "metrics.jsonl"), run_dir / "config.yaml"
    train, evals = metrics.read("train"), metrics.read("eval")
    if not train and not evals:
        what = "has no records" if metrics.path.is_file() else "is not there"
        raise ValueError(f"{metrics.path} {what}: {run_dir} is not the folder of a run, or it has just begun")
    config: dict[str, Any] = read_yaml(path, "put it back from a copy, or remove it") if path.is_file() else {}
    step, steps = max(record["step"] for record in train + evals), config.get("steps")
    running = steps is not None and step < steps
    parts = sorted({name for record in train for name in record if name.startswith("parts/")})
    specs = CHARTS | {"Outcome": [*CHARTS["Outcome"], *_parts(parts)]}
    charts = {title: [_chart(spec, train, evals) for spec in section] for title, section in specs.items()}
    ends = {f"step {record['step']}": record for record in (evals[0], evals[-1])} if evals else {}
    names = list(ends)
    held = {name: read_held_out(run_dir, ends[name]["step"]) for name in names}
    before, after = (held[names[0]], held[names[-1]]) if len(names) > 1 else ([], [])
    seconds = sum(value for r in train + evals for name, value in r.items() if name.startswith("seconds/"))
    return render(
        kind="Training run, not finished" if running else "Training run",
        title=run_dir.resolve().name,
        facts=known_facts(
            ("task", (config.get("env") or {}).get("id")),
            ("model", (config.get("model") or {}).get("name")),
            ("steps", f"{step} of {steps}" if running else step),
            *_settings(config),
            ("time", duration(seconds)),
        ),
        headline=[*_headline(train, evals), *_difference(before, after)],
        warnings=run_warnings(before, after, train),
        sections=[
            {"title": title, "charts": kept}
            for title, section in charts.items()
            if (kept := [chart for chart in section if chart["series"]])
        ],
        table=None,
        matrix=None,
        browser=sample_browser(
            (sample | {"adapter": name} for name in names for sample in held[name]),
            names,
            names[::-1] if len(names) > 1 else [],
            _change,
        ),
        sampled=_sampled(run_dir),
        changed=_changed(config),
        config=setting_texts(config),
    )


def _parts(names: Sequence[str]) -> list[ChartSpec]:
    if len(names) < 2:  # the reward itself
        return []
    fields = {name.removeprefix("parts/"): f"train/{name}" for name in names}
    return [ChartSpec("Parts of the reward", "number", fields, "Means of sampled episodes, before they are weighed.")]


def _settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that a reader asks for first."""
    learner, rollout, adapter = (config.get(name) or {} for name in ("learner", "rollout", "adapter"))
    problems, episodes = rollout.get("prompts_per_step"), rollout.get("group_size")
    a_step = f"{counted(problems, 'problem')} x {counted(episodes, 'episode')}" if problems and episodes else None
    return [
        ("a step", a_step),
        ("rank", adapter.get("rank")),
        ("objective", learner.get("objective")),
        ("learning rate", f"{learner['learning_rate']:g}" if "learning_rate" in learner else None),
        ("seed", config.get("seed")),
    ]


def _changed(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that differ from the defaults, without the run's folder."""
    defaults = dict(setting_texts(json.loads(json.dumps(dataclasses.asdict(TrainConfig())))))
    return [
        (name, value)
        for name, value in setting_texts(config)
        if name not in ("run_dir", "resume") and defaults.get(name) != value
    ]


def _difference(before: Sequence[Sample], after: Sequence[Sample]) -> list[dict[str, str]]:
    """The change of held-out accuracy, paired by problem, as a figure at the top of the page."""
    gain = change(before, after)
    if gain is None:
        return []
    interval = f"95 %: {points(gain['low'], gain['high'])}"
    return [
        {
            "label": "difference, paired by problem",
            "value": f"{signed(gain['difference'])} points",
            "detail": ", ".join(filter(None, [interval, p_equation(gain["p"])])),
        }
    ]


def _sampled(run_dir: Path) -> list[dict[str, Any]]:
    """Episodes as they were sampled in training, by step and problem; of many, steps that are spread evenly."""
    steps = stored_steps(run_dir)
    by_step = {step: read_samples(run_dir, step) for step in steps}
    size = {step: sum(len(text) for s in samples for text in s["completions"]) for step, samples in by_step.items()}
    while len(steps) > 2 and sum(size[step] for step in steps) > MAX_SAMPLED_CHARS:
        steps = sorted({*steps[::-2], steps[0]})
    return [{"step": step, "problems": sample_browser(by_step[step], ["policy"])["problems"]} for step in steps]


def _chart(spec: ChartSpec, train: Sequence[Record], evals: Sequence[Record]) -> Chart:
    """A chart of the records, without lines that have no number, and without lines of clipping or faults at zero."""
    series: list[dict[str, Any]] = []
    for name, path in spec.lines.items():
        kind, _, field = path.partition("/")
        points = [point(record["step"], record, field) for record in (train if kind == "train" else evals)]
        known = [value for _, value, *_ in points if value is not None]
        if any(known) or (known and field not in ("clip_fraction", "unscorable")):
            series.append({"name": name, "points": points, "color": _color(path, [line["color"] for line in series])})
    chart = {"title": spec.title, "note": spec.note, "unit": spec.unit}
    return chart | {"kind": "line", "x": "step", "series": series, "reference": None}


def _color(path: str, taken: Sequence[int]) -> int:
    """The colour of a line's kind, the same on every chart; a free colour where another line has that kind."""
    kind, _, field = path.partition("/")
    meant = HELD_OUT if kind == "eval" else SAMPLED if field in SAMPLED_FIELDS else LEARNED
    return meant if meant not in taken and not field.startswith("parts/") else FURTHER + len(taken)


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
            headline_figure(f"held-out {measure}, {f'step {step}' if step else 'before training'}", record, measure)
            for step, record in ends.items()
        ]
    known = [record for record in train if record.get("reward") is not None]
    return [headline_figure(f"sampled reward, step {r['step']}", r, "reward") for r in known[:1] + known[-1:]]
