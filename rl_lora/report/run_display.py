"""What a run shows, and what it leaves to look at: progress, samples, the summary, `reward.png`, `report.html`.

The training reads back only whether it is finished. Without a terminal the same lines come, without the bar.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rl_lora.config import TrainConfig
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.peft_io import lora_dropout
from rl_lora.metrics.collapse import reply_warning, run_warnings
from rl_lora.metrics.records import MAX_REASONS, MetricsFile, Record
from rl_lora.metrics.samples import Sample, content_hash
from rl_lora.metrics.summary import Evaluation, change
from rl_lora.policy.policy import Policy
from rl_lora.report.html import lines, write
from rl_lora.report.next_command import next_command
from rl_lora.report.run_samples import rewind_samples
from rl_lora.report.training_page import training_page
from rl_lora.rollout.contract import TaskError
from rl_lora.rollout.given import in_python
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.system.terminal import Terminal, in_line, visible
from rl_lora.trainer.checkpoint import Checkpoints
from rl_lora.types import Group

N_TRANSCRIPTS = 3
WAIT = 0.1
"""Share of sampling and learning from which on the wait for rewards is told."""
SUMMARY = {
    *("steps", "before", "after", "reward_first", "reward_last", "learned", "seconds"),
    *("adapter", "best_checkpoint", "best_score", "transcripts", "next"),
}
"""Of summary.json, in every version."""


class RunReport:
    """The terminal and the readable files of one run. `visible` is False on all processes but the first."""

    def __init__(self, run_dir: Path, visible: bool = True):
        self.run_dir, self.visible = run_dir, visible
        self.console = Terminal(quiet=not visible)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._what, self._n = "", 0
        self._reward = "reward –"

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """A line that says what takes a moment."""
        with self.console.status(Text(f"{in_line(what)} ...")):
            yield

    @contextmanager
    def progress(self, steps: int, done: int) -> Iterator[None]:
        """The bar: steps, reward, what is going on, time left."""
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[reward]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.visible) as self._progress:
            self._task = self._progress.add_task("", total=steps, completed=done, reward=self._reward)
            yield
        self._progress = None

    def sampling(self, n_tokens: int) -> None:
        """n_tokens more were drawn."""
        self._doing("sampling", n_tokens)

    def evaluating(self, n_tokens: int) -> None:
        """n_tokens more were drawn in an evaluation."""
        self._doing("evaluating", n_tokens)

    def learning(self, n_tokens: int) -> None:
        """n_tokens more were learned from."""
        self._doing("learning", n_tokens)

    def _doing(self, what: str, n_tokens: int) -> None:
        self._n = n_tokens + (self._n if what == self._what else 0)
        self._what = what
        if self._progress is not None:
            self._progress.update(self._task, description=f"{what}, {self._n:,} tokens")

    def header(self, config: TrainConfig, policy: Policy, adapter: Adapter, step: int, n_processes: int) -> None:
        """What is about to run, what is special about it, and how to read the lines that follow."""
        r = config.rollout
        self.console.print(
            Text(in_line(config.env.id), "bold"),
            f": {r.prompts_per_step} problems x {r.group_size} episodes a step, {config.learner.objective}, learning "
            f"rate {config.learner.learning_rate:g}, seed {config.seed}",
            sep="",
        )
        processes = "1 process" if n_processes == 1 else f"{n_processes} processes"
        base = sum(parameter.numel() for parameter in policy.model.parameters())
        self.console.print(
            f"{in_line(policy.name)}: {base / 1e6:,.0f}M parameters frozen ("
            f"{str(policy.dtype).removeprefix('torch.')}, {policy.device}, {processes}), "
            f"{adapter.n_parameters:,} trained (rank {adapter.rank})"
        )
        for remark in policy.remarks(adapter):
            self.console.print(remark)
        if policy.not_shared:
            what = Text("prompts are not shared by their completions, which is slower:", "yellow")
            self.console.print(what, policy.not_shared)
        if n_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            self.console.print(
                Text("the launcher was asked for several processes and started one:", "yellow"),
                "accelerate launch --cpu needs MPI for more; torchrun --nproc_per_node N -m rl_lora train ... does not",
            )
        dropout = 0.0 if step or config.adapter.init_from is None else lora_dropout(Path(config.adapter.init_from))
        if dropout:
            start = in_line(str(config.adapter.init_from))
            what = Text(f"{start} was trained with lora_dropout {dropout:g}:", "yellow")
            self.console.print(what, "here nothing is dropped, and the adapter that is saved says 0")
        if config.shuffle_rewards:
            self.console.print("control: rewards are shuffled, there is nothing to learn", style="yellow")
        legend = (
            "a line a step; loss: -log p of a token of the demonstrations, in nats; seconds: reading + learning"
            if config.learner.objective == "likelihood"
            else "a line a step, of sampled (not greedy) episodes; kl: mean |log p_learner - log p_sampler|; equal: "
            "groups whose rewards are all the same, which teach nothing; cut: replies that reached max_tokens; "
            "seconds: sampling + learning"
        )
        self.console.print(legend, style="dim", soft_wrap=False)
        if step:
            self.console.print(f"going on from step {step}")

    def step(self, step: int, record: Record) -> None:
        """One line a step."""
        parts = [f"step {step:>3}"]
        given = record["groups_without_signal"] is None  # replies that were not sampled
        if given:
            parts.append(f"loss {_number(record['loss'], '.3f')}")
        else:
            parts.append(f"reward {_number(record['reward'], '.3f')}")
            if record["accuracy"] is not None and record["accuracy"] != record["reward"]:
                parts.append(f"accuracy {record['accuracy']:.3f}")
        parts.append(f"entropy {_number(record['entropy'], '.2f')}")
        if not given:
            parts.append(f"kl {_number(record['sampler_learner_kl'], '.4f')}")
        parts.append(f"grad {_number(record['grad_norm'], '.2g')}")
        if not given:
            replaced = f" ({record['groups_replaced']} replaced)" if record["groups_replaced"] else ""
            parts.append(f"equal {record['groups_without_signal']:.0%}{replaced}")
            parts.append(f"cut {_number(record['truncated'], '.0%')}")
        if record["unscorable"]:
            parts.append(f"unscorable {record['unscorable']:.0%}")
        parts.append(f"{record['tokens_per_episode'] or 0:.0f} tokens")
        parts.append(f"{record['seconds/rollout']:.1f}+{record['seconds/learn']:.1f} s")
        if record.get("seconds/reward", 0.0) > WAIT * (record["seconds/rollout"] + record["seconds/learn"]):
            parts.append(f"waited {record['seconds/reward']:.1f} s for rewards")
        self.console.print("  ".join(parts))
        self._reward, self._what = f"reward {_number(record['reward'], '.3f')}", ""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, reward=self._reward)

    def failed(self, error: TaskError) -> None:
        """The first episode that failed, while the run goes on."""
        self.console.print(f"an episode failed, and is left out: {error}", style="yellow")

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """One line, and the episodes as `evals/step-N.jsonl`."""
        self.console.print(f"step {step:>3}  held out: {held_out_line(evaluation.record)}", style="cyan")
        path = self._evals(step)
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(json.dumps(sample) + "\n" for sample in evaluation.samples()))
        if step and (warning := reply_warning(evaluation.samples(), self._held_out(0))):
            self.console.print(warning, style="yellow")

    def samples(self, step: int, groups: Sequence[Group], what: str = "sampled in") -> None:
        """A table of completions, sampled or demonstrated: of the first groups, the best and the worst episode."""
        table = Table(title=f"{what} step {step}", title_justify="left", show_edge=False, pad_edge=False)
        for column in ("problem", "reply", "reward"):
            table.add_column(column, justify="right" if column == "reward" else "left", overflow="fold")
        for group in [group for group in groups if group.episodes][:4]:
            by_reward = sorted(group.episodes, key=lambda episode: episode.reward)
            for episode in {id(e): e for e in (by_reward[-1], by_reward[0])}.values():
                replies = " / ".join(turn.text for turn in episode.turns)
                table.add_row(Text(_short(episode.observations[0])), Text(_short(replies)), f"{episode.reward:.2f}")
        self.console.print(table)

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Forget the evaluations and the sampled episodes after `step`; without `evaluated`, its evaluation too."""
        rewind_samples(self.run_dir, step)
        for path in self.run_dir.glob("evals/step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) >= step + (evaluated and step > 0):
                with files.writing(path):
                    path.unlink()

    def finish(self, config: TrainConfig, metrics: MetricsFile, checkpoints: Checkpoints) -> None:
        """Write summary.json, reward.png and report.html."""
        evals, train = metrics.read("eval"), metrics.read("train")
        best, adapter = checkpoints.best(), str(self.run_dir / "adapter")
        before, after = (self._held_out(step) if evals else [] for step in (0, evals[-1]["step"] if evals else 0))
        summary: dict[str, Any] = {
            "steps": config.steps,
            "before": evals[0] if evals and evals[0]["step"] == 0 else None,
            "after": evals[-1] if evals else None,
            "reward_first": train[0]["reward"] if train else None,
            "reward_last": train[-1]["reward"] if train else None,
            "change": change(before, after) if before and after and evals[-1]["step"] else None,
            "warnings": run_warnings(before, after, train),
            "learned": any(record["tokens_learned"] for record in train),
            "scored": any(record["reward"] is not None for record in train),
            "unscorable": _reasons(train),
            "unscorable_held_out": _reasons(evals[-1:]),
            "seconds": sum(value for r in evals + train for name, value in r.items() if name.startswith("seconds/")),
            "adapter": adapter,
            "best_checkpoint": str(best.folder) if best else None,
            "best_score": best.state["score"] if best else None,
            "transcripts": newly_solved(before, after),
            "next": in_python(config.env, adapter) or next_command(config, adapter),
        }
        plot_rewards(train, evals, self.run_dir / "reward.png")
        write(training_page(self.run_dir), self.run_dir / "report.html")
        summary = json.loads(json.dumps(summary))  # as it will be read
        files.write_text(self._summary, json.dumps(summary | {"hash": content_hash(summary)}, indent=1) + "\n")

    def finished_at(self, steps: int) -> bool:
        """Whether the run is there to its last step. A summary that is damaged counts as none, and is written anew."""
        try:
            return bool(self._read_summary().get("steps") == steps)
        except FileNotFoundError:
            return False
        except ValueError as error:
            self.say(str(error))
            return False

    @property
    def _summary(self) -> Path:
        return self.run_dir / "summary.json"

    def _read_summary(self) -> dict[str, Any]:
        """Raises ValueError for a file that is not what was written, FileNotFoundError where there is none."""
        again = "it is written again at the end of the run"
        summary = files.read_json(self._summary, again)
        known = summary.pop("hash", None) if isinstance(summary, dict) else "of something else"
        whole = summary.keys() >= SUMMARY if known is None else known == content_hash(summary)  # older ones have none
        if not whole:
            raise ValueError(f"{self._summary} has changed since it was written; {again}")
        return summary

    def say(self, *notes: str) -> None:
        """What the user should know of the run's files."""
        for note in filter(None, notes):
            self.console.print(note, style="yellow")

    def show(self) -> None:
        """The summary: before and after, problems solved now and not before, where things are, what to try next."""
        summary = self._read_summary()
        out = self.console.print
        out(f"\n{summary['steps']} steps in {summary['seconds'] / 60:.1f} minutes", style="bold")
        for when in ("before", "after"):
            if summary[when]:
                out(f"  {when:<6}  {held_out_line(summary[when])}")
        if gain := summary.get("change"):
            ends = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
            out(f"  change  {100 * gain['difference']:+.1f} points (95 %: {ends}), paired by problem")
        first, last = summary["reward_first"], summary["reward_last"]
        if first is not None or last is not None:  # demonstrations have none
            ends = f"{_number(first, '.3f')} in the first step, {_number(last, '.3f')} in the last"
            out(f"  mean reward of sampled episodes: {ends}")
        unscorable, held_out = summary.get("unscorable"), summary.get("unscorable_held_out")
        nothing = bool(unscorable) and not summary["scored"]
        if unscorable:
            said = "  sampled episodes that could not be scored:"
            out(Text("nothing could be scored:", "yellow") if nothing else said, in_line(_counted(unscorable)))
        if held_out:
            out(f"  held-out episodes that could not be scored: {in_line(_counted(held_out))}")
        if not summary["learned"] and not nothing:
            out(
                Text("nothing was learned: no group had different rewards.", "yellow"),
                "Problems may be too hard or too easy; look at the samples, raise rollout.max_tokens where replies are "
                "cut off, raise rollout.group_size, or reward partial success",
            )
        for warning in summary.get("warnings", []):
            out(warning, style="yellow")
        if summary["transcripts"]:
            out("\nsolved now and not before", style="bold")
        for transcript in summary["transcripts"]:
            out(f"  {_short(transcript['problem'], 200)}")
            out(f"    before: {_short(transcript['before'])}", style="red")
            out(f"    after:  {_short(transcript['after'])}", style="green")
        places = [f"\nadapter       {in_line(summary['adapter'])}  (PEFT format)"]
        if summary["best_checkpoint"]:
            places.append(f"best held out {in_line(summary['best_checkpoint'])}  ({summary['best_score']:.3f})")
            before = summary["before"] or {}
            score = before.get("reward") if before.get("accuracy") is None else before["accuracy"]
            if score is not None and summary["best_score"] <= score:
                places.append("              (no better than before training)")
        places.append(f"report        {in_line(self.run_dir / 'report.html')}")
        places.append(f"curve         {in_line(self.run_dir / 'reward.png')}")
        places.append(f"all numbers   {in_line(self.run_dir / 'metrics.jsonl')}")
        places.append(f"next          {summary['next']}\n")
        out("\n".join(places))

    def _evals(self, step: int) -> Path:
        return self.run_dir / "evals" / f"step-{step:06d}.jsonl"

    def _held_out(self, step: int) -> list[Sample]:
        """The held-out samples of an evaluation; none where there was no such evaluation."""
        return list(lines(self._evals(step)))


def newly_solved(before: Sequence[Sample], after: Sequence[Sample]) -> list[dict[str, str]]:
    """Held-out problems that are solved now and were not before, with both replies; the first few."""
    earlier = {sample["seed"]: sample for sample in before}
    solved = [s for s in after if s["seed"] in earlier and s["success"] and not earlier[s["seed"]]["success"]]
    return [
        {
            "problem": sample["observations"][0],
            "before": " / ".join(earlier[sample["seed"]]["completions"]),
            "after": " / ".join(sample["completions"]),
        }
        for sample in solved[:N_TRANSCRIPTS]
    ]


def _reasons(records: Sequence[Record]) -> dict[str, int]:
    """Why episodes could not be scored, over several records."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.get("unscorable_reasons", {}))
    return dict(counts.most_common(MAX_REASONS))


def _counted(reasons: dict[str, int]) -> str:
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.items())


def held_out_line(record: Record) -> str:
    """Accuracy with its interval, reward, truncation: one line."""
    parts = []
    if record["accuracy"] is not None:
        low_high = f" [{record['accuracy_low']:.1%}, {record['accuracy_high']:.1%}]" if "accuracy_low" in record else ""
        parts.append(f"accuracy {record['accuracy']:.1%}{low_high}")
    parts.append(f"reward {_number(record['reward'], '.3f')}")
    parts.append(f"cut off {_number(record['truncated'], '.0%')}")
    if record["unscorable"]:
        parts.append(f"unscorable {record['unscorable']:.0%}")
    return ", ".join(parts) + f" ({record['episodes']} episodes)"


def plot_rewards(train: Sequence[Record], evals: Sequence[Record], path: Path) -> None:
    """Mean reward of the sampled episodes, and held-out accuracy with its 95 % interval, over steps.

    Colours as on the run's page: what is held out is blue, what was sampled in training orange.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(record["step"], record["reward"]) for record in train if record["reward"] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="tab:orange", alpha=0.8, label="reward, sampled in training")
    checked = [record for record in evals if record["accuracy"] is not None]
    if checked:
        accuracy = [record["accuracy"] for record in checked]
        low = [max(0.0, record["accuracy"] - record.get("accuracy_low", record["accuracy"])) for record in checked]
        high = [max(0.0, record.get("accuracy_high", record["accuracy"]) - record["accuracy"]) for record in checked]
        steps = [record["step"] for record in checked]
        axes.errorbar(
            steps, accuracy, [low, high], fmt="o-", color="tab:blue", capsize=3, label="accuracy, held out (95 %)"
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    if points or checked:
        axes.legend(loc="best")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    files.write_bytes(path, image.getbuffer())


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _short(text: str, n: int = 100) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= n else text[: n - 1] + "…"
