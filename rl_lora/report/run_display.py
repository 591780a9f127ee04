"""A run on the terminal: progress, the header, a line a step, samples, and the summary at the end.

Without a terminal the same lines come, without the bar. What a run writes is in `run_samples.py` and `run_summary.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from rl_lora.metrics.records import Record
from rl_lora.report.formats import formatted, points, signed
from rl_lora.settings.algorithm import objective_of
from rl_lora.system.plurals import counted
from rl_lora.system.terminal import Terminal, in_line, visible
from rl_lora.types import Group

WAIT = 0.1
"""Share of sampling and learning from which on the wait for rewards is told."""
SAMPLED_LEGEND = (
    "a line a step, of sampled (not greedy) episodes; kl: mean |log p_learner - log p_sampler|; equal: groups whose "
    "rewards are all the same, which teach nothing; cut: replies that reached max_tokens; seconds: sampling + learning"
)
DEMONSTRATED_LEGEND = (
    "a line a step; loss: -log p of a token of the demonstrations, in nats; seconds: reading + learning"
)


@dataclass(frozen=True)
class ModelFacts:
    """The base and the adapter that is trained, as the header of a run names them."""

    name: str
    n_frozen: int
    """Parameters of the base."""
    dtype: str
    device: str
    n_trained: int
    """Parameters of the adapter."""
    rank: int
    remarks: Sequence[str] = ()
    """Lines about the base, and about layers that the adapter leaves alone."""
    not_shared: str | None = None
    """Reason why completions do not share the computation of their prompt; None where they do."""
    dropout: float = 0.0
    """lora_dropout that the adapter at the start of the run was trained with."""


class RunDisplay:
    """The lines of one run. `is_visible` is False on all processes but the first."""

    def __init__(self, is_visible: bool = True):
        self.is_visible = is_visible
        self.console = Terminal(quiet=not is_visible)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage, self._n_tokens = "", 0
        self._reward = "reward –"

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """A line on the terminal while the block runs."""
        with self.console.status(Text(f"{in_line(what)} ...")):
            yield

    @contextmanager
    def progress(self, steps: int, done: int) -> Iterator[None]:
        """The bar: steps, reward, stage, time left."""
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[reward]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.is_visible) as self._progress:
            self._task = self._progress.add_task("", total=steps, completed=done, reward=self._reward)
            yield
        self._progress = None

    def sampling(self, n_tokens: int) -> None:
        """n_tokens more were sampled."""
        self._count("sampling", n_tokens)

    def evaluating(self, n_tokens: int) -> None:
        """n_tokens more were sampled in an evaluation."""
        self._count("evaluating", n_tokens)

    def learning(self, n_tokens: int) -> None:
        """n_tokens more were learned from."""
        self._count("learning", n_tokens)

    def _count(self, stage: str, n_tokens: int) -> None:
        self._n_tokens = n_tokens + (self._n_tokens if stage == self._stage else 0)
        self._stage = stage
        if self._progress is not None:
            self._progress.update(self._task, description=f"{stage}, {counted(self._n_tokens, 'token')}")

    def header(self, config: TrainConfig, model: ModelFacts, step: int, n_processes: int) -> None:
        """The run, its model, its special cases, and the legend of the lines that follow."""
        r = config.rollout
        self.console.print(
            Text(in_line(config.env.id), "bold"),
            f": {counted(r.prompts_per_step, 'problem')} x {counted(r.group_size, 'episode')} a step, "
            f"{config.learner.objective}, learning rate {config.learner.learning_rate:g}, seed {config.seed}",
            sep="",
        )
        self.console.print(
            f"{in_line(model.name)}: {model.n_frozen / 1e6:,.0f}M parameters frozen ({model.dtype}, {model.device}, "
            f"{counted(n_processes, 'process', 'processes')}), {model.n_trained:,} trained (rank {model.rank})"
        )
        for remark in model.remarks:
            self.console.print(remark)
        if model.not_shared:
            what = Text("prompts are not shared by their completions, which is slower:", "yellow")
            self.console.print(what, model.not_shared)
        if n_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            self.console.print(
                Text("the launcher was asked for several processes and started one:", "yellow"),
                "accelerate launch --cpu needs MPI for more; torchrun --nproc_per_node N scripts/train.py ... does not",
            )
        if model.dropout:
            start = in_line(str(config.adapter.init_from))
            what = Text(f"{start} was trained with lora_dropout {model.dropout:g}:", "yellow")
            self.console.print(what, "here nothing is dropped, and the adapter that is saved says 0")
        if config.shuffle_rewards:
            self.console.print("control: rewards are shuffled, there is nothing to learn", style="yellow")
        legend = SAMPLED_LEGEND if objective_of(config.learner).needs_samples else DEMONSTRATED_LEGEND
        self.console.print(legend, style="dim", soft_wrap=False)
        if step:
            self.console.print(f"going on from step {step}")

    def step(self, step: int, record: Record) -> None:
        """One line a step."""
        self.console.print(step_line(step, record))
        self._reward, self._stage = f"reward {formatted(record['reward'], '.3f')}", ""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, reward=self._reward)

    def failed(self, error: Exception) -> None:
        """The first episode that failed, while the run goes on."""
        self.console.print(f"an episode failed, and is left out: {error}", style="yellow")

    def evaluation(self, step: int, record: Record, warning: str | None = None) -> None:
        """One line an evaluation, and a warning about it if there is one."""
        self.console.print(f"step {step:>3}  held out: {held_out_line(record)}", style="cyan")
        self.say(warning)

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

    def say(self, *notes: str | None) -> None:
        """Notes that the user should read."""
        for note in filter(None, notes):
            self.console.print(note, style="yellow")

    def summary(self, run_dir: Path, summary: dict[str, Any]) -> None:
        """The end of a run: results, problems solved now and not before, places of the files, the next command."""
        out = self.console.print
        out(f"\n{counted(summary['steps'], 'step')} in {summary['seconds'] / 60:.1f} minutes", style="bold")
        for line in result_lines(summary):
            out(line)
        self._faults(summary)
        if summary["transcripts"]:
            out("\nsolved now and not before", style="bold")
        for transcript in summary["transcripts"]:
            out(f"  {_short(transcript['problem'], 200)}")
            out(f"    before: {_short(transcript['before'])}", style="red")
            out(f"    after:  {_short(transcript['after'])}", style="green")
        out("\n".join(place_lines(run_dir, summary)))

    def _faults(self, summary: dict[str, Any]) -> None:
        """Episodes that could not be scored, a run that learned nothing, warnings."""
        out, learned = self.console.print, summary["learned"]
        unscorable, held_out = summary.get("unscorable"), summary.get("unscorable_held_out")
        if unscorable and not summary["scored"]:
            learned = True  # nothing was, and this is why
            out(Text("nothing could be scored:", "yellow"), in_line(_reason_counts(unscorable)))
        elif unscorable:
            out(f"  sampled episodes that could not be scored: {in_line(_reason_counts(unscorable))}")
        if held_out:
            out(f"  held-out episodes that could not be scored: {in_line(_reason_counts(held_out))}")
        if not learned:
            out(
                Text("nothing was learned: no group had different rewards.", "yellow"),
                "Problems may be too hard or too easy; look at the samples, raise rollout.max_tokens where replies are "
                "cut off, raise rollout.group_size, or reward partial success",
            )
        self.say(*summary.get("warnings", []))


def step_line(step: int, record: Record) -> str:
    """The figures of a step. Demonstrations have a loss in place of the figures of sampled episodes."""
    parts = [f"step {step:>3}"]
    sampled = record["groups_without_signal"] is not None
    if sampled:
        parts.append(f"reward {formatted(record['reward'], '.3f')}")
        if record["accuracy"] is not None and record["accuracy"] != record["reward"]:
            parts.append(f"accuracy {record['accuracy']:.3f}")
    else:
        parts.append(f"loss {formatted(record['loss'], '.3f')}")
    parts.append(f"entropy {formatted(record['entropy'], '.2f')}")
    if sampled:
        parts.append(f"kl {formatted(record['sampler_learner_kl'], '.4f')}")
    parts.append(f"grad {formatted(record['grad_norm'], '.2g')}")
    if sampled:
        replaced = f" ({record['groups_replaced']} replaced)" if record["groups_replaced"] else ""
        parts.append(f"equal {record['groups_without_signal']:.0%}{replaced}")
        parts.append(f"cut {formatted(record['truncated'], '.0%')}")
    if record["unscorable"]:
        parts.append(f"unscorable {record['unscorable']:.0%}")
    parts.append(counted(round(record["tokens_per_episode"] or 0), "token"))
    parts.append(f"{record['seconds/rollout']:.1f}+{record['seconds/learn']:.1f} s")
    if record.get("seconds/reward", 0.0) > WAIT * (record["seconds/rollout"] + record["seconds/learn"]):
        parts.append(f"waited {record['seconds/reward']:.1f} s for rewards")
    return "  ".join(parts)


def held_out_line(record: Record) -> str:
    """Accuracy with its interval, reward, truncation: one line."""
    parts = []
    if record["accuracy"] is not None:
        low_high = f" [{record['accuracy_low']:.1%}, {record['accuracy_high']:.1%}]" if "accuracy_low" in record else ""
        parts.append(f"accuracy {record['accuracy']:.1%}{low_high}")
    parts.append(f"reward {formatted(record['reward'], '.3f')}")
    parts.append(f"cut off {formatted(record['truncated'], '.0%')}")
    if record["unscorable"]:
        parts.append(f"unscorable {record['unscorable']:.0%}")
    return ", ".join(parts) + f" ({counted(record['episodes'], 'episode')})"


def result_lines(summary: dict[str, Any]) -> Iterator[str]:
    """Held-out figures before and after, their change, and the rewards of the first and the last step."""
    for when in ("before", "after"):
        if summary[when]:
            yield f"  {when:<6}  {held_out_line(summary[when])}"
    if gain := summary.get("change"):
        ends = points(gain["low"], gain["high"])
        yield f"  change  {signed(gain['difference'])} points (95 %: {ends}), paired by problem"
    first, last = summary["reward_first"], summary["reward_last"]
    if first is not None or last is not None:  # demonstrations have none
        ends = f"{formatted(first, '.3f')} in the first step, {formatted(last, '.3f')} in the last"
        yield f"  mean reward of sampled episodes: {ends}"


def place_lines(run_dir: Path, summary: dict[str, Any]) -> Iterator[str]:
    """The places of the run's files, and the next command."""
    yield f"\nadapter       {in_line(summary['adapter'])}  (PEFT format)"
    if summary["best_checkpoint"]:
        yield f"best held out {in_line(summary['best_checkpoint'])}  ({summary['best_score']:.3f})"
        before = summary["before"] or {}
        score = before.get("reward") if before.get("accuracy") is None else before["accuracy"]
        if score is not None and summary["best_score"] <= score:
            yield "              (no better than before training)"
    for name, file in (("report", "report.html"), ("curve", "reward.png"), ("all numbers", "metrics.jsonl")):
        yield f"{name:<13} {in_line(run_dir / file)}"
    yield f"next          {summary['next']}\n"


def _reason_counts(reasons: dict[str, int]) -> str:
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.items())


def _short(text: str, n: int = 100) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= n else text[: n - 1] + "…"
