"""What a run writes down and shows, step by step: metrics.jsonl, episodes, trackers, and lines on the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rl_lora.config import TrainConfig
from rl_lora.lora.adapter import Adapter
from rl_lora.metrics.collapse import reply_warning
from rl_lora.metrics.records import MetricsFile, Record
from rl_lora.metrics.summary import Evaluation
from rl_lora.policy.policy import Policy
from rl_lora.report.next_command import next_command
from rl_lora.report.run_display import ModelFacts, RunDisplay
from rl_lora.report.run_samples import read_held_out, rewind_episodes, write_held_out, write_samples
from rl_lora.report.run_summary import read_summary, write_results
from rl_lora.rollout.python_objects import in_python
from rl_lora.settings.dotted import flatten
from rl_lora.system.files import write_text, writing
from rl_lora.system.plain_yaml import dump
from rl_lora.trainer.checkpoint import Checkpoint
from rl_lora.trainer.run_folder import clear_left_overs
from rl_lora.types import Group


class RunLog:
    """Files and terminal of a run, which the main process writes to, and its trackers."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.run_dir = config, accelerator, Path(config.run_dir)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self.display = RunDisplay(accelerator.is_main_process)

    def open(self, model: ModelFacts, step: int, evaluated: bool, damaged: Sequence[str]) -> None:
        """Write down what is run, and forget what came after the step that is gone on from.

        `evaluated`: whether that step has been. `damaged`: what is wrong with checkpoints that were passed over.
        """
        if self.accelerator.is_main_process:
            record = self.run_dir / "config.yaml"
            with writing(record):
                self.run_dir.mkdir(parents=True, exist_ok=True)
            clear_left_overs(self.run_dir)
            write_text(record, dump(dataclasses.asdict(self.config)))
            self.display.say(*(f"{damage}: passed over for the newest that is whole" for damage in damaged))
            self.display.say(self.metrics.rewind(step if step else -1, evaluated))
            rewind_episodes(self.run_dir, step, evaluated)
            self.display.header(self.config, model, step, self.accelerator.num_processes)
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(self.config).items()}
        kwargs = tracker_kwargs(self.run_dir.resolve().name)
        if step:
            kwargs["tensorboard"] = {"purge_step": step + 1}  # what will be said again
        with writing(self.run_dir / "trackers"):
            self.accelerator.init_trackers("rl_lora", config=flat, init_kwargs=kwargs)

    def train(self, step: int, record: Record, groups: list[Group], caption: str) -> None:
        """A training step: its record, and the episodes of all processes."""
        if self.accelerator.is_main_process:
            self.metrics.append("train", step, record)
            self.display.step(step, record)
            log = self.config.log
            if log.samples_every and (step % log.samples_every == 0 or step == 1):
                self.display.samples(step, groups, caption)
            write_samples(self.run_dir, step, groups, log.samples_per_step, log.samples_mib)
        self._track(step, record, "train")

    def evaluation(self, step: int, evaluation: Evaluation, record: Record) -> None:
        """A held-out evaluation: its record, and its episodes."""
        if self.accelerator.is_main_process:
            self.metrics.append("eval", step, record)
            samples = evaluation.samples()
            write_held_out(self.run_dir, step, samples)
            warning = reply_warning(samples, read_held_out(self.run_dir, 0)) if step else None
            self.display.evaluation(step, record, warning)
        self._track(step, record, "eval")

    def results(self, adapter: Path, best: Checkpoint | None) -> None:
        """The end of the run: summary.json, the picture and the page, and a summary on the terminal."""
        write_results(
            self.run_dir,
            self.config.steps,
            adapter=adapter,
            best=(best.folder, best.state["score"]) if best else None,
            next_command=in_python(self.config.env, str(adapter)) or next_command(self.config, str(adapter)),
        )
        self.display.summary(self.run_dir, read_summary(self.run_dir))

    def close(self) -> None:
        """End the trackers."""
        with writing(self.run_dir / "trackers"):
            self.accelerator.end_training()

    def _track(self, step: int, record: Record, kind: str) -> None:
        numbers = {f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        with writing(self.run_dir / "trackers"):
            self.accelerator.log(numbers, step=step)


def tracker_kwargs(name: str) -> dict[str, dict[str, Any]]:
    """What accelerate's trackers take, each in its own words, to call a run by its name."""
    words = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name"}
    words |= {"swanlab": "experiment_name", "aim": "experiment"}
    return {tracker: {word: name} for tracker, word in words.items()}


def model_facts(policy: Policy, adapter: Adapter, dropout: float) -> ModelFacts:
    """The model of a run, as its header names it."""
    return ModelFacts(
        name=policy.name,
        n_frozen=sum(parameter.numel() for parameter in policy.model.parameters()),
        dtype=str(policy.dtype).removeprefix("torch."),
        device=str(policy.device),
        n_trained=adapter.n_parameters,
        rank=adapter.rank,
        remarks=policy.remarks(adapter),
        not_shared=policy.not_shared,
        dropout=dropout,
    )
