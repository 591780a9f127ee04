"""Evaluate adapters side by side over one base: `python scripts/evaluate.py --adapters runs/a runs/b`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import yaml
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import envs  # noqa: F401  registers the environments
from rl_lora.adapter_io import check_adapter, load_adapter
from rl_lora.checkpoint import Checkpoints
from rl_lora.config import EnvConfig, ModelConfig, RolloutConfig
from rl_lora.environment import held_out
from rl_lora.evaluate import evaluate
from rl_lora.metrics import Record
from rl_lora.native_sampler import NativeSampler
from rl_lora.policy import Policy
from rl_lora.preflight import check_model
from rl_lora.rollout import RolloutWorker
from rl_lora.trainer import no_accelerator
from scripts.command import main as command

BASE = "base"


@dataclass
class EvaluateConfig:
    """Evaluate LoRA adapters, and the bare base, on held-out problems: one base, all adapters in the same batches."""

    adapters: list[str] = field(default_factory=list)
    """Adapter folders (PEFT format), checkpoints, or run folders: the final adapter, or else the last checkpoint's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    env_kwargs: dict[str, Any] | None = None
    """Arguments of the environment that differ in evaluation. Where it takes a split, {split: eval} is added."""
    episodes: int = 256
    """Held-out problems."""
    n: int = 1
    """Samples of each problem and adapter."""
    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int = 16
    """Limit of one reply."""
    max_turns: int = 16
    """Replies of an episode, at most."""
    system_prompt: str | None = None
    """First message of every conversation."""
    seed: int = 0
    """Of sampling."""
    max_rows: int = 256
    """Completions that are decoded at a time: less takes less memory."""
    out: str = "evaluation"
    """Folder for results.json and samples.jsonl; what an earlier evaluation left there is replaced."""


def run(config: EvaluateConfig) -> list[Record]:
    """Evaluate, print the table, write the files."""
    console = Console(highlight=False, soft_wrap=True)
    validate(config)
    state = PartialState(cpu=no_accelerator())
    if state.num_processes > 1:
        raise ValueError(f"evaluation runs in one process, got {state.num_processes}; start it without a launcher")
    folders = named([path for path in config.adapters if not is_unfinished(Path(path))])
    for path in config.adapters:
        if is_unfinished(Path(path)):
            console.print(f"{path} has no checkpoint yet, and is left out", style="yellow", markup=False)
    notes = [note for folder in folders.values() for note in differences(folder, config)]
    make_env, seeds = held_out(config.env, config.env_kwargs, config.episodes)
    check_model(config.model)

    with console.status(Text(f"loading {config.model.name} ...")):
        policy = Policy.from_config(config.model, state.device)
        for name, folder in folders.items():
            load_adapter(folder, policy.bank, name)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    limits = RolloutConfig(max_tokens=config.max_tokens, max_turns=config.max_turns, system_prompt=config.system_prompt)
    sampler = NativeSampler(policy, config.max_rows)
    worker = RolloutWorker(make_env, sampler, policy.chat, limits, context_length=policy.context_length)

    start = time.perf_counter()
    adapters = [None, *folders]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=len(adapters) * len(seeds) * config.n * config.max_tokens)
        evaluations = evaluate(
            worker,
            seeds,
            adapters,
            n=config.n,
            temperature=config.temperature,
            random_seed=config.seed,
            on_token=lambda n: progress.advance(task, n),
        )
    seconds = time.perf_counter() - start
    worker.close()

    records = [
        {"adapter": e.adapter or BASE, "folder": str(folders.get(e.adapter or "", "")), **e.record} for e in evaluations
    ]
    console.print(table(records))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for e in evaluations for s in e.samples()))
    results = {"config": asdict(config), "seconds": seconds, "results": records}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    n_tokens = sum(episode.n_tokens for e in evaluations for group in e.groups for episode in group.episodes)
    console.print(
        f"{len(adapters)} x {len(seeds)} problems x {config.n} in {seconds:.0f} s ({n_tokens / seconds:.0f} tokens/s)\n"
        f"results  {out / 'results.json'}\nsamples  {out / 'samples.jsonl'}"
    )
    return records


def validate(config: EvaluateConfig) -> None:
    """Raises ValueError with every number that cannot be meant."""
    least = {"episodes": 1, "n": 1, "max_tokens": 1, "max_turns": 1, "max_rows": 1, "seed": 0, "temperature": 0}
    wrong = [
        f"{name} must be >= {low}, got {getattr(config, name)}"
        for name, low in least.items()
        if not getattr(config, name) >= low
    ]
    if config.n > 1 and config.temperature == 0:
        wrong.append(f"n must be 1 at temperature 0, got {config.n}: greedy samples are all the same")
    if not math.isfinite(config.temperature):
        wrong.append(f"temperature must be finite, got {config.temperature}")
    if wrong:
        raise ValueError("; ".join(wrong))


def adapter_in(folder: Path) -> Path:
    """The adapter that a run folder, a checkpoint or an adapter folder stands for."""
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    latest = Checkpoints(folder / "checkpoints", 1).latest()
    return latest.adapter if latest else folder


def is_unfinished(folder: Path) -> bool:
    """Whether it is the folder of a run that came to no checkpoint."""
    return (folder / "config.yaml").is_file() and adapter_in(folder) == folder


def differences(folder: Path, config: EvaluateConfig) -> Iterator[str]:
    """Where an adapter comes from something else than it is evaluated on. Raises ValueError if it cannot be read."""
    base = check_adapter(folder).get("base_model_name_or_path")
    if base not in (None, "", config.model.name):
        yield f"{folder} was made for {base}, and is evaluated on {config.model.name}"
    if task := other_task(folder, config):
        yield f"{folder} was trained with {task}, and is evaluated otherwise"


def other_task(folder: Path, config: EvaluateConfig) -> str:
    """What the run that a folder belongs to was trained on, if that is not what is evaluated."""
    record = next((parent / "config.yaml" for parent in folder.parents if (parent / "config.yaml").is_file()), None)
    if record is None:
        return ""
    run = yaml.safe_load(record.read_text())
    mine = {"env": asdict(config.env), "max_tokens": config.max_tokens, "system_prompt": config.system_prompt}
    trained = {"env": run["env"], **{name: run["rollout"][name] for name in ("max_tokens", "system_prompt")}}
    return ", ".join(f"{name} {value}" for name, value in trained.items() if value != mine[name])


def named(paths: list[str]) -> dict[str, Path]:
    """A short name for every adapter folder: the shortest end of its path that no other shares."""
    folders = [adapter_in(Path(path)) for path in paths]
    names: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        parts = [part for part in folder.resolve().parts if part != "adapter"]
        others = [[part for part in o.resolve().parts if part != "adapter"] for o in folders if o != folder]
        length = next((k for k in range(1, len(parts)) if all(o[-k:] != parts[-k:] for o in others)), len(parts))
        names["/".join(parts[-length:])] = folder
    return names


def table(records: list[Record]) -> Table:
    """One row an adapter; the base is the first."""
    result = Table(show_edge=False, pad_edge=False)
    result.add_column("adapter", overflow="fold", min_width=10)
    for column in ("accuracy", "95 %", "to base", "reward", "cut off", "tokens"):
        result.add_column(column, justify="right", no_wrap=True)
    base = records[0]["accuracy"]
    for record in records:
        accuracy = record["accuracy"]
        interval = f"{record['accuracy_low']:.1%} to {record['accuracy_high']:.1%}" if "accuracy_low" in record else "–"
        result.add_row(
            Text(record["adapter"]),
            "–" if accuracy is None else f"{accuracy:.1%}",
            interval,
            "–" if accuracy is None or record is records[0] else f"{100 * (accuracy - base):+.1f}",
            "–" if record["reward"] is None else f"{record['reward']:.3f}",
            "–" if record["truncated"] is None else f"{record['truncated']:.0%}",
            "–" if record["tokens_per_episode"] is None else f"{record['tokens_per_episode']:.1f}",
        )
    return result


def main() -> None:
    command(EvaluateConfig, run)


if __name__ == "__main__":
    main()
