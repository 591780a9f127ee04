"""The evaluation of adapters side by side: the command `rl-lora evaluate`, and `rl_lora.evaluate` in Python.

Problems are gone through in batches, each under all models at once; a batch that is finished is on the disk. The
figures are those of `results.py`, the file of samples is that of `sample_store.py`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.text import Text

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.candidates import BASE, adapter_folders, is_unfinished, mismatches, path_notes
from rl_lora.evaluation.missing import Occupancy, draw_missing
from rl_lora.evaluation.plan import SampleSet, adapter_hash, plan_batches, sampling_settings
from rl_lora.evaluation.results import results_of, savings
from rl_lora.evaluation.run_task import resolve_task
from rl_lora.evaluation.sample_store import SampleStore
from rl_lora.lora.peft_io import base_of, load_adapter
from rl_lora.metrics.records import Record
from rl_lora.metrics.samples import content_hash
from rl_lora.policy.default_choice import settled
from rl_lora.policy.inspection import inspect_model
from rl_lora.policy.policy import Policy
from rl_lora.report.evaluation_page import evaluation_page
from rl_lora.report.evaluation_table import show
from rl_lora.rollout.held_out import held_out
from rl_lora.rollout.problems import check_problems
from rl_lora.rollout.python_objects import with_objects
from rl_lora.rollout.worker import MakeEnv, RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.settings.validation import validate_evaluation
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.system.distributed import no_accelerator
from rl_lora.system.terminal import Terminal, in_line
from rl_lora.trainer.task import ProblemRecord, problems_of


def evaluate(config: EvaluateConfig, *, reward: Any = None, data: Any = None, eval_data: Any = None) -> Record:
    """Evaluate, print the table, write the files; returns the content of results.json.

    `reward`, `data`, `eval_data`: the arguments of `trainer.train`.

    Samples that `config.out` holds already (of the same problem, weights and `sampling_settings`) are not drawn again.

    Raises:
        ValueError: something is wrong with the config; before the model is loaded wherever it can be known before.
    """
    console = Terminal()
    unfinished = [path for path in config.adapters if is_unfinished(Path(path))]
    paths = [path for path in config.adapters if path not in unfinished]
    if unfinished and not paths:
        raise ValueError(
            f"the run in {unfinished[0]} has saved no adapter yet; go on with it by its command and --resume true, or "
            "name another folder"
        )
    for path in unfinished:
        console.print(f"the run in {in_line(path)} has saved no adapter yet, and is left out", style="yellow")
    task = resolve_task(config, paths)
    settings = replace(task.settings, env=with_objects(task.settings.env, reward, data, eval_data))
    validate_evaluation(settings)
    check_out(settings.out)
    console.print(task.line)
    prepared = prepare(settings, paths, console)
    results, occupancy = run_evaluation(prepared, console)
    show(console, results)
    for warning in results["warnings"]:
        console.print(warning, style="yellow")
    console.print(savings(prepared.config, results, len(prepared.problems), occupancy))
    for name in ("results.json", "samples.jsonl", "report.html"):
        console.print(f"{name.partition('.')[0]:8} {in_line(Path(settings.out) / name)}")
    return results


@dataclass(frozen=True)
class Prepared:
    """An evaluation, checked as far as it can be before the model is loaded."""

    config: EvaluateConfig
    folders: dict[str, Path]
    """Adapter folders by the names of their rows."""
    make_env: MakeEnv
    problems: list[ProblemRecord]
    notes: list[str]
    """Differences between training and evaluation, to be said: `candidates.mismatches`."""
    device: torch.device
    compiles: bool

    @property
    def names(self) -> list[str]:
        """The rows of the table."""
        return [BASE, *self.folders]


def prepare(config: EvaluateConfig, paths: Sequence[str], console: Terminal) -> Prepared:
    """Check an evaluation before the model is loaded. Raises ValueError."""
    state = PartialState(cpu=no_accelerator())
    if state.num_processes > 1:
        raise ValueError(f"evaluation runs in one process, got {state.num_processes}; start it without a launcher")
    folders = adapter_folders(paths)
    for note in path_notes(paths, folders):
        console.print(in_line(note))
    if config.against not in (None, BASE, *folders):
        raise ValueError(f"against must be one of the rows {', '.join([BASE, *folders])}, got {config.against!r}")
    base = settled(config.model.name, [base_of(folder) for folder in folders.values()])
    config = replace(config, model=replace(config.model, name=base))
    notes = [note for folder in folders.values() for note in mismatches(folder, config)]
    make_env, seeds = held_out(config.env, config.env_kwargs, config.limit)
    problems = problems_of(make_env, seeds)
    chat, context_length = inspect_model(config.model)
    check_problems(make_env, seeds, chat, config, context_length)
    compiles = should_compile(config.model.compile, state.device)
    return Prepared(config, folders, make_env, problems, notes, state.device, compiles)


def run_evaluation(prepared: Prepared, console: Terminal) -> tuple[Record, Occupancy]:
    """Load the model, draw what is missing and write the files.

    Returns the content of results.json, and how full the batches were.
    """
    config, names = prepared.config, prepared.names
    start = time.perf_counter()
    with console.status(Text(f"loading {in_line(config.model.name)} ...")):
        policy = Policy.from_config(config.model, prepared.device)
    seconds_loading = time.perf_counter() - start
    hashes = {BASE: BASE}
    hashes |= {name: adapter_hash(load_adapter(folder, policy.bank, name)) for name, folder in prepared.folders.items()}
    settings = sampling_settings(config, policy, prepared.make_env)
    for note in prepared.notes:
        console.print(in_line(note), style="yellow")
    plan = plan_batches(config, prepared.problems, hashes, content_hash(settings))
    rows_of = {weights: [name for name in names if hashes[name] == weights] for weights in hashes.values()}
    wanted = {samples.key(k): rows_of[samples.weights] for batch in plan for samples in batch for k in range(config.n)}
    sampler = make_sampler(policy, config, compile=prepared.compiles)
    worker = RolloutWorker(
        prepared.make_env,
        sampler,
        policy.chat,
        config,
        context_length=policy.context_length,
        on_failure=lambda error: console.print(f"left out: {error}", style="yellow"),
    )
    occupancy = Occupancy(sampler.check_every)
    with SampleStore(Path(config.out), wanted, config.resume) as store:
        start = time.perf_counter()
        _draw(config, worker, plan, store, occupancy, console)
        seconds = time.perf_counter() - start
        rows = [store.row(name) for name in names]
        results = results_of(config, prepared.folders, rows) | {
            "hashes": {
                "sampling": content_hash(settings),
                "problems": content_hash([problem.hash for problem in prepared.problems]),
                "adapters": hashes,
            },
            "settings": settings,
            "seconds": seconds,
            "seconds_loading": seconds_loading,
            "n_drawn": len(wanted) - store.n_found,
            "n_found": store.n_found,
            "rows_per_pass": occupancy.rows,
        }
        files.write_text(store.path.with_name("results.json"), json.dumps(results, indent=1) + "\n")
    files.write_text(store.path.with_name("report.html"), evaluation_page(results, itertools.chain(*rows)))
    return results, occupancy


def _draw(
    config: EvaluateConfig,
    worker: RolloutWorker,
    plan: Sequence[Sequence[SampleSet]],
    store: SampleStore,
    occupancy: Occupancy,
    console: Terminal,
) -> None:
    """Fill the store; where that is interrupted, say what is kept."""
    for stale in ("results.json", "report.html"):
        with files.writing(store.path.with_name(stale)):
            store.path.with_name(stale).unlink(missing_ok=True)
    try:
        draw_missing(config, worker, plan, store, occupancy, console)
    except BaseException:
        n_kept = sum(not sample.get("failed") for sample in store.samples.values())
        there = f"{n_kept} of {len(store.wanted)} samples are in {in_line(store.path)}"
        console.print(f"stopped; {there}, and the same command goes on from there")
        raise
    worker.close()
    store.append_failed()


def check_out(folder: str) -> None:
    """Raises ValueError where an evaluation may not, or cannot, be written."""
    if (Path(folder) / "config.yaml").is_file():
        raise ValueError(f"out must not be the folder of a training run, whose report would be lost, got {folder}")
    files.check_writable(Path(folder), "out")
