"""From the paths that a user names to adapters with short names: run folders, checkpoints, PEFT folders.

Nothing is loaded here; faults of a folder that show without loading it are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rl_lora.config import EvaluateConfig
from rl_lora.lora.peft_io import CONFIG, base_of
from rl_lora.settings.dotted import as_typed
from rl_lora.system.files import read_json, read_yaml
from rl_lora.trainer.checkpoint import Checkpoints, check_whole
from rl_lora.trainer.taken import CHECKPOINT

BASE = "base"
"""Name of the bare base's row."""


def adapter_in(folder: Path) -> Path:
    """The adapter that a run folder, a checkpoint or an adapter folder stands for."""
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    latest = checkpoints.latest() or next(reversed(checkpoints.all()), None)  # a damaged one is named by `mismatches`
    return latest.adapter if latest else folder


def is_unfinished(folder: Path) -> bool:
    """Whether it is the folder of a run that came to no checkpoint."""
    begun = (folder / "config.yaml").is_file() or (folder / ".lock").is_file()
    return begun and not (folder / CONFIG).exists() and adapter_in(folder) == folder


def adapter_folders(paths: Sequence[str]) -> dict[str, Path]:
    """A short name for every adapter folder: the shortest end of its path that no other shares, and not the base's."""
    folders = [adapter_in(Path(path)) for path in paths]
    names: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        parts = [part for part in folder.resolve().parts if part != "adapter"]
        others = [[part for part in o.resolve().parts if part != "adapter"] for o in folders if o != folder] + [[BASE]]
        length = next((k for k in range(1, len(parts)) if all(o[-k:] != parts[-k:] for o in others)), len(parts))
        names["/".join(parts[-length:])] = folder
    return names


def path_notes(paths: Sequence[str], names: dict[str, Path]) -> Iterator[str]:
    """Notes on the paths that were named: which checkpoint stands for a run, and which adapter is named twice."""
    name_of, seen = {folder: name for name, folder in names.items()}, set()
    for path in paths:
        folder = adapter_in(Path(path))
        again = ", and is shown once" if folder in seen else ""
        if again or (folder != Path(path) and folder != Path(path) / "adapter"):
            yield f"{path} stands for {name_of[folder]}{again}"
        seen.add(folder)


def step_of(adapter: Path) -> int | None:
    """The step of training after which an adapter was saved, where its folder says."""
    folder = adapter.parent if adapter.name == "adapter" else adapter
    if match := CHECKPOINT.fullmatch(folder.name):
        return int(match[1])
    summary = folder / "summary.json"  # written after the adapter of a run that is finished
    if adapter == folder or not summary.is_file():
        return None
    return int(read_json(summary, "the run writes it again with --resume true").get("steps", 0)) or None


def mismatches(folder: Path, config: EvaluateConfig) -> Iterator[str]:
    """Where the base or the task that an adapter was trained with differs from those of the evaluation. Raises
    ValueError if the adapter cannot be read."""
    check_whole(folder)
    base = base_of(folder)
    if base not in ("", config.model.name):
        yield f"{folder} was made for {base}, and is evaluated on {config.model.name}"
    if task := other_task(folder, config):
        yield f"{folder} was trained with {task}, and is evaluated otherwise"


def record_of(folder: Path) -> Path | None:
    """The config.yaml of the run that an adapter folder belongs to: RUN/adapter, or RUN/checkpoints/step-N/adapter."""
    places = [folder.resolve().parents[i] for i in (0, 2) if len(folder.resolve().parents) > i]
    kept = [place / "config.yaml" for place in places if (place / "metrics.jsonl").is_file()]
    return next((record for record in kept if record.is_file()), None)


def other_task(folder: Path, config: EvaluateConfig) -> str:
    """The task of the run that a folder belongs to, where another one is evaluated; else an empty text."""
    record = record_of(folder)
    if record is None:
        return ""
    run = read_yaml(record, "put it back from a copy, or remove it")
    mine = {"env": asdict(config.env), "max_tokens": config.max_tokens, "system_prompt": config.system_prompt}
    trained = {"env": run["env"], **{name: run["rollout"][name] for name in ("max_tokens", "system_prompt")}}
    return ", ".join(f"{name} {as_typed(value)}" for name, value in trained.items() if value != mine[name])
