"""The task and the base of an evaluation: as the user says, else as the adapters' runs agree, else the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.candidates import adapter_in, record_of
from rl_lora.lora import peft_io
from rl_lora.settings.dotted import as_typed, flatten
from rl_lora.settings.from_run import OF_RUN, without_run
from rl_lora.system.files import read_yaml
from rl_lora.system.model_names import EMBEDDED_MODEL, canonical
from rl_lora.system.terminal import in_line

TASK = ("env.id", "env.kwargs", "env_kwargs")
"""Options that make a task: where the user names an environment, none of them is taken from a run."""


@dataclass(frozen=True)
class ResolvedTask:
    """The settings of an evaluation, and where its task comes from."""

    settings: EvaluateConfig
    """Complete: no setting is left to a run."""
    origin: str

    @property
    def line(self) -> str:
        """One line for the terminal."""
        s = self.settings
        kwargs = f" {as_typed(s.env.kwargs | (s.env_kwargs or {}))}" if s.env.kwargs or s.env_kwargs else ""
        return in_line(f"task  {s.env.id}{kwargs}, max_tokens {s.max_tokens}, {s.model.name}: {self.origin}")


def resolve_task(config: EvaluateConfig, paths: Sequence[str]) -> ResolvedTask:
    """Fill in the settings that `config` leaves open. `paths`: the adapters that are there.

    Raises:
        ValueError: the runs disagree about an open setting, or a run's config.yaml cannot be read.
    """
    said = flatten(config)
    chosen = {name: value for name, value in said.items() if name in OF_RUN and value is not None}
    user_task = "env.id" in chosen
    records = {
        relative(record.parent): task_of(record) for path in paths if (record := record_of(adapter_in(Path(path))))
    }
    open_names = [name for name in OF_RUN if name not in chosen and not (user_task and name in TASK)]
    if "env.kwargs" in chosen and not user_task:
        open_names.append("env.kwargs")  # what is given goes over the run's
    found, wrong = {}, {}
    for name in open_names:
        answers = [task[name] for task in records.values()]
        if answers and all(answer == answers[0] for answer in answers):
            found[name] = answers[0]
        elif answers and not user_task:
            wrong[name] = ", ".join(f"{as_typed(task[name])} in {folder}" for folder, task in records.items())
    if wrong:
        what = "; ".join(f"{name}: {each}" for name, each in wrong.items())
        options = " ".join(f"--{name} ..." for name in wrong)
        raise ValueError(f"the runs differ in what they were trained on ({what}): say what to evaluate with {options}")
    if "model.name" not in chosen | found and (base := common_base(paths)):
        found["model.name"] = base
    values = without_run() | {name: value for name, value in found.items() if value is not None} | chosen
    if "env.kwargs" in found and "env.kwargs" in chosen:
        values["env.kwargs"] = found["env.kwargs"] | chosen["env.kwargs"]
    values["system_prompt"] = values["system_prompt"] or None
    if user_task or not records:
        origin = "as given" if user_task else "the default task"
    else:
        origin = f"the task of {', '.join(records)}" + (", with what is given" if chosen else "")
    return ResolvedTask(with_values(config, values), origin)


def relative(folder: Path) -> str:
    """A path as it would be typed here."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def with_values(config: EvaluateConfig, values: dict[str, Any]) -> EvaluateConfig:
    """The config with other values of some settings, by dotted names."""
    groups: dict[str, dict[str, Any]] = {"": {}, "model": {}, "env": {}}
    for name, value in values.items():
        group, _, inner = name.rpartition(".")
        groups[group][inner] = value
    model, env = replace(config.model, **groups["model"]), replace(config.env, **groups["env"])
    return replace(config, **groups[""], model=model, env=env)


def task_of(record: Path) -> dict[str, Any]:
    """The values of the options in OF_RUN in a run's config.yaml; defaults for those that an older one lacks."""
    run = read_yaml(record, "put it back from a copy, or remove it")
    defaults = without_run()
    found = {}
    for name, place in OF_RUN.items():
        group, _, inner = place.partition(".")
        section = run.get(group)
        found[name] = section.get(inner, defaults[name]) if isinstance(section, dict) else defaults[name]
    return found | {"model.name": canonical(found["model.name"])}


def common_base(paths: Sequence[str]) -> str | None:
    """The base that all adapters were made for, if they say the same one and it is on this machine."""
    bases = {peft_io.base_of(adapter_in(Path(path))) for path in paths}
    if len(bases) != 1:
        return None
    (base,) = bases
    here = base == EMBEDDED_MODEL or (Path(base).expanduser() / "config.json").is_file()
    if not here and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        here = isinstance(try_to_load_from_cache(base, "config.json"), str)
    return base if here else None
