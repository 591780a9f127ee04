"""A run's folder before the run begins: its checks, and the base of the run that it holds."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_lora.config import TrainConfig
from rl_lora.lora.peft_io import base_of
from rl_lora.policy.default_choice import settled
from rl_lora.settings.comparison import differences
from rl_lora.settings.dotted import flatten
from rl_lora.settings.validation import validate
from rl_lora.system import files
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL, canonical
from rl_lora.trainer.checkpoint import Checkpoint, Checkpoints
from rl_lora.trainer.taken import refuse_taken
from rl_lora.trainer.task import task_changes, task_record

FILES = ("config.yaml", "metrics.jsonl", "adapter", "summary.json", "reward.png", "report.html")


def holds_run(run_dir: Path) -> bool:
    """Whether a run has written to the folder before."""
    return (run_dir / "config.yaml").exists() or bool(Checkpoints(run_dir / "checkpoints", 1).all())


def with_base(config: TrainConfig) -> TrainConfig:
    """The config with the base that the default name stands for, so that it is written down which it was: that of the
    run that is gone on with; else that of the adapter that is started from, or this machine's (`default_choice.py`)."""
    if config.model.name != DEFAULT_MODEL:
        return config
    validate(config)
    record = Path(config.run_dir) / "config.yaml"
    if config.resume and record.exists():
        with suppress(ValueError):  # said by `check_run_dir`
            name = canonical(flatten_record(files.read_yaml(record, ""))["model.name"])
            known = name in (EMBEDDED_MODEL, HUB_MODEL)
            return replace(config, model=replace(config.model, name=name)) if known else config
    wanted = [] if config.adapter.init_from is None else [base_of(Path(config.adapter.init_from))]
    return replace(config, model=replace(config.model, name=settled(DEFAULT_MODEL, wanted)))


def check_run_dir(config: TrainConfig) -> None:
    """A folder that holds a run is only touched to continue that run, and only if it is still the same run.

    Raises:
        ValueError: it is not, or the folder cannot be written to, or no checkpoint is whole.
    """
    run_dir = Path(config.run_dir)
    files.check_writable(run_dir, "run_dir")
    record, checkpoints = run_dir / "config.yaml", Checkpoints(run_dir / "checkpoints", 1)
    refuse_taken(config)
    if not config.resume or not (checkpoints.all() or record.exists()):
        return  # nothing of a run that died before its first checkpoint is worth keeping
    latest = checkpoints.latest()
    if latest is None and (damaged := checkpoints.damaged()):
        raise ValueError(
            f"no checkpoint in {checkpoints.folder} is whole: {'; '.join(damaged)}. Put the file back from a copy, "
            "or start over in another --run_dir"
        )
    if latest and latest.step > config.steps:
        raise ValueError(
            f"{config.run_dir} has come to step {latest.step}, behind steps={config.steps}; set --steps to "
            f"{latest.step} or more"
        )
    if latest:
        old = latest.state["config"]
    else:
        old = flatten_record(files.read_yaml(record, "remove it: this run has no checkpoint yet, and starts over"))
    if changed := differences(config, old):
        raise ValueError(
            f"{config.run_dir} holds a run of another configuration, and resuming would mix the two: "
            f"{'; '.join(changed)}. Set these back (all its settings are --config {shlex.quote(str(record))} "
            "--resume true), or choose another --run_dir"
        )
    task = latest.state.get("task") if latest else None  # older ones have none
    if latest and task and (changed := task_changes(task, task_record(config), config.env.id)):
        raise other_task_error(config, latest, changed)


def other_task_error(config: TrainConfig, latest: Checkpoint, changes: list[str]) -> ValueError:
    """The error of a run that would be resumed with another task or model."""
    return ValueError(
        f"{config.run_dir} holds a run of another task, and resuming would mix the two: {'; '.join(changes)}. Set "
        "this back, or choose another --run_dir (what was learned here can be its start: --adapter.init_from "
        f"{latest.adapter})"
    )


def flatten_record(nested: dict[str, Any]) -> dict[str, Any]:
    """The dotted names and values of a config.yaml."""
    known = set(flatten(TrainConfig()))

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if prefix in known or not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, item in value.items() for k, v in walk(f"{prefix}.{key}" if prefix else key, item).items()
        }

    return walk("", nested)


def clear_left_overs(run_dir: Path) -> None:
    """Delete the files that a process was writing or removing when it died."""
    files.clear_left_overs(run_dir, *FILES)
    for folder in ("evals", "samples"):
        files.clear_left_overs(run_dir / folder, "step-*")
