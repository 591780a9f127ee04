"""The evaluation of adapters side by side: what `rl-lora evaluate` does, and `rl_lora.evaluate` from a REPL.

Problems are gone through in batches, each under all models at once; a batch that is finished is on the disk. The
figures are `evaluation.py`'s, the file of samples `samples.py`'s, and the table `evaluation_table.py`'s.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from rich.progress import Progress
from rich.text import Text

from rl_lora.config import EvaluateConfig, EvaluationSettings
from rl_lora.evaluation.candidates import BASE, differences, is_unfinished, named, stand_ins, step_of
from rl_lora.evaluation.run_task import whose_task
from rl_lora.evaluation.sample_store import Key, SampleStore
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.peft_io import base_of, load_adapter
from rl_lora.metrics.collapse import reply_warning
from rl_lora.metrics.records import Record
from rl_lora.metrics.samples import content_hash, sample_of
from rl_lora.metrics.summary import compared, pairs, row
from rl_lora.policy.default_choice import settled
from rl_lora.policy.policy import Policy
from rl_lora.report.evaluation_page import evaluation_page
from rl_lora.report.evaluation_table import show
from rl_lora.rollout.given import with_given
from rl_lora.rollout.held_out import held_out
from rl_lora.rollout.problems import check_problems
from rl_lora.rollout.worker import MakeEnv, Plays, RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.settings.bounds import out_of_bounds
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.system.distributed import no_accelerator
from rl_lora.system.terminal import Terminal, in_line
from rl_lora.trainer.preflight import check_model
from rl_lora.trainer.task import Problem, problems_of, sources

AHEAD = 4
"""Rows of a batch of problems for each row that is decoded at a time: how much is lost when the process dies, against
the rows that wait for the last ones of a batch to end."""


@dataclass(frozen=True)
class Asked:
    """The samples of one problem under one model, which is one adapter (None: the base) with these weights."""

    adapter: str | None
    weights: str
    sampling_hash: str
    problem: Problem

    def key(self, k: int) -> Key:
        """What sample number k is known by: `samples.IDENTITY`."""
        return self.weights, self.sampling_hash, self.problem.hash, k


@dataclass
class Decoding:
    """How full the batches were."""

    tokens_a_look: int
    looks: int = 0
    tokens: int = 0

    def __call__(self, n_tokens: int) -> None:
        self.looks += 1
        self.tokens += n_tokens

    @property
    def rows(self) -> float | None:
        """Mean number of completions that drew a token in a pass."""
        return self.tokens / (self.looks * self.tokens_a_look) if self.looks else None


def evaluate(config: EvaluateConfig, *, reward: Any = None, data: Any = None, eval_data: Any = None) -> Record:
    """Evaluate, print the table, write the files; returns what results.json holds.

    `reward`, `data`, `eval_data`: what `trainer.train` was given.

    What `config.out` holds of the same samples (problem, weights, settings: `sampling_settings`) is not drawn again.

    Raises:
        ValueError: something is wrong with the config; before the model is loaded wherever it can be known before.
    """
    console = Terminal()
    unfinished = [path for path in config.adapters if is_unfinished(Path(path))]
    for path in unfinished:
        console.print(f"{in_line(path)} has no checkpoint yet, and is left out", style="yellow")
    paths = [path for path in config.adapters if path not in unfinished]
    whose = whose_task(config, paths)
    settings = replace(whose.settings, env=with_given(whose.settings.env, reward, data, eval_data))
    validate(settings)
    console.print(whose.line)
    return _evaluate(settings, paths, console)


def _evaluate(config: EvaluationSettings, paths: Sequence[str], console: Terminal) -> Record:
    state = PartialState(cpu=no_accelerator())
    if state.num_processes > 1:
        raise ValueError(f"evaluation runs in one process, got {state.num_processes}; start it without a launcher")
    folders = named(paths)
    for note in stand_ins(paths, folders):
        console.print(in_line(note))
    names = [BASE, *folders]
    if config.against is not None and config.against not in names:
        raise ValueError(f"against must be one of the rows {', '.join(names)}, got {config.against!r}")
    base = settled(config.model.name, [base_of(folder) for folder in folders.values()])
    config = replace(config, model=replace(config.model, name=base))
    notes = [note for folder in folders.values() for note in differences(folder, config)]
    make_env, seeds = held_out(config.env, config.env_kwargs, config.limit)
    problems = problems_of(make_env, seeds)
    chat, context_length = check_model(config.model)
    check_problems(make_env, seeds, chat, config, context_length)

    compiles = should_compile(config.model.compile, state.device)
    start = time.perf_counter()
    with console.status(Text(f"loading {in_line(config.model.name)} ...")):
        policy = Policy.from_config(config.model, state.device)
    seconds_loading = time.perf_counter() - start
    hashes = {BASE: BASE} | {name: hash_of(load_adapter(folder, policy.bank, name)) for name, folder in folders.items()}
    settings = sampling_settings(config, policy, make_env)
    for note in notes:
        console.print(in_line(note), style="yellow")
    plan = planned(config, problems, hashes, content_hash(settings))
    rows_of = {weights: [name for name in names if hashes[name] == weights] for weights in hashes.values()}
    wanted = {asked.key(k): rows_of[asked.weights] for batch in plan for asked in batch for k in range(config.n)}
    sampler = make_sampler(policy, config, compile=compiles)
    worker = RolloutWorker(
        make_env,
        sampler,
        policy.chat,
        config,
        context_length=policy.context_length,
        on_failure=lambda error: console.print(f"left out: {error}", style="yellow"),
    )
    decoding = Decoding(sampler.check_every)
    out = Path(config.out)
    with SampleStore(out, wanted, config.resume) as store:
        for stale in ("results.json", "report.html"):
            with files.writing(out / stale):
                (out / stale).unlink(missing_ok=True)
        start = time.perf_counter()
        try:
            draw_missing(config, worker, plan, store, decoding, console)
        except BaseException:
            n_kept = sum(not sample.get("failed") for sample in store.samples.values())
            there = f"{n_kept} of {len(wanted)} samples are in {in_line(store.path)}"
            console.print(f"stopped; {there}, and the same command goes on from there")
            raise
        worker.close()
        store.append_failed()
        seconds = time.perf_counter() - start
        rows = [store.row(name) for name in names]
        results = results_of(config, folders, rows) | {
            "hashes": {
                "sampling": content_hash(settings),
                "problems": content_hash([problem.hash for problem in problems]),
                "adapters": hashes,
            },
            "settings": settings,
            "seconds": seconds,
            "seconds_loading": seconds_loading,
            "n_drawn": len(wanted) - store.n_found,
            "n_found": store.n_found,
            "rows_per_pass": decoding.rows,
        }
        files.write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    files.write_text(out / "report.html", evaluation_page(results, itertools.chain(*rows)))
    show(console, results)
    for warning in results["warnings"]:
        console.print(warning, style="yellow")
    console.print(savings(config, results, len(problems), decoding))
    console.print(
        "\n".join(
            f"{name.partition('.')[0]:8} {in_line(out / name)}"
            for name in ("results.json", "samples.jsonl", "report.html")
        )
    )
    return results


def validate(config: EvaluationSettings) -> None:
    """Raises ValueError with every number that cannot be meant."""
    wrong = out_of_bounds(config)
    if config.n > 1 and config.temperature == 0:
        wrong.append(f"n must be 1 at temperature 0, got {config.n}: greedy samples are all the same")
    if bad := [k for k in config.k if not 1 <= k <= config.n]:
        wrong.append(f"k must be from 1 to n={config.n}, the samples of a problem, got {', '.join(map(str, bad))}")
    if (Path(config.out) / "config.yaml").is_file():
        wrong.append(f"out must not be the folder of a training run, whose report would be lost, got {config.out}")
    if wrong:
        raise ValueError("; ".join(wrong))
    files.check_writable(Path(config.out), "out")


def ks_of(config: EvaluationSettings) -> list[int]:
    """The k of pass@k and maj@k."""
    powers = [2**i for i in range(config.n.bit_length())]
    return sorted(set(config.k or [*powers, config.n]))


def hash_of(adapter: Adapter) -> str:
    """Of all that decides what an adapter computes; its name and its folder do not."""
    return content_hash(adapter.hash(), adapter.ranks, adapter.alphas, adapter.rslora)


def sampling_settings(config: EvaluationSettings, policy: Policy, make_env: MakeEnv) -> Record:
    """What decides, beside problem and adapter, which samples are drawn and how they are judged.

    Left out is what changes rounding only: how many rows are decoded at a time, and on which device. Of code,
    `task.sources` says what is looked at.
    """
    return {
        "base": policy.bank.base_hash(),
        "dtype": str(policy.dtype),
        "chat_template": content_hash(policy.chat.tokenizer.chat_template),
        "template_kwargs": policy.chat.template_kwargs,
        "stop_ids": sorted(policy.chat.stop_ids),
        "env": {"id": config.env.id, "kwargs": config.env.kwargs, "env_kwargs": config.env_kwargs},
        "env_code": content_hash(*sources(make_env)),
        "system_prompt": config.system_prompt,
        "max_tokens": config.max_tokens,
        "max_turns": config.max_turns,
        "temperature": config.temperature,
        "seed": config.seed if config.temperature > 0 else None,
    }


def planned(
    config: EvaluationSettings, problems: Sequence[Problem], hashes: dict[str, str], sampling_hash: str
) -> list[list[Asked]]:
    """Batches of equal shares of the problems, each under every model: the same ones when an evaluation goes on, so
    that it comes to the same in any arithmetic. A batch has about AHEAD * max_rows rows; adapters with the same weights
    are one model."""
    models = {weights: None if name == BASE else name for name, weights in reversed(hashes.items())}
    order = dict.fromkeys(hashes.values())
    n_batches = max(1, round(len(problems) * len(models) * config.n / (AHEAD * config.max_rows)))
    return [
        [Asked(models[weights], weights, sampling_hash, problems[i]) for weights in order for i in part]
        for part in np.array_split(np.arange(len(problems)), n_batches)
        if len(part)
    ]


def draw_missing(
    config: EvaluationSettings,
    worker: RolloutWorker,
    plan: Sequence[Sequence[Asked]],
    store: SampleStore,
    decoding: Decoding,
    console: Terminal,
) -> None:
    """Draw what is not in the store, batch by batch."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sampling", total=(len(store.wanted) - store.n_found) * config.max_tokens)

        def on_token(n_tokens: int) -> None:
            decoding(n_tokens)
            progress.advance(task, n_tokens)

        for batch in plan:
            missing: list[tuple[Asked, int]] = []
            for asked in batch:
                first = next((k for k in range(config.n) if asked.key(k) not in store.samples), config.n)
                if first < config.n:
                    missing.append((asked, first))
            if not missing:
                continue
            played = worker.play(
                [Plays(asked.adapter, asked.problem.seed, config.n - first, first) for asked, first in missing],
                random_seed=(config.seed,),
                temperature=config.temperature,
                on_token=on_token,
            )
            store.append(
                sample_of(
                    episode,
                    first + i,
                    problem=asked.problem.hash,
                    reference=asked.problem.reference,
                    adapter_hash=asked.weights,
                    sampling_hash=asked.sampling_hash,
                )
                for (asked, first), episodes in zip(missing, played, strict=True)
                for i, episode in enumerate(episodes)
            )
            progress.update(task, completed=(len(store.samples) - store.n_found) * config.max_tokens)


def results_of(config: EvaluationSettings, folders: dict[str, Path], rows: Sequence[list[dict[str, Any]]]) -> Record:
    """The figures: a row for the base and each adapter, and all pairs of them."""
    names, ks = [BASE, *folders], ks_of(config)
    matrix = pairs(rows, config.n, config.seed)
    against = None if config.against is None else names.index(config.against)
    records = []
    for i, (name, samples) in enumerate(zip(names, rows, strict=True)):
        folder = folders.get(name)
        place = {"name": name, "folder": str(folder or ""), "step": folder and step_of(folder)}
        versus = {"difference": compared(matrix[i][0])}
        if against is not None:
            versus["against"] = compared(matrix[i][against])
        records.append({**place, **row(samples, ks), **versus})
    base, *others = rows
    said = ((name, reply_warning(samples, base)) for name, samples in zip(folders, others, strict=True))
    warnings = [f"{name}: {warning}" for name, warning in said if warning]
    figures = {"k": ks, "rows": records, "pairs": matrix, "warnings": warnings}
    return {"kind": "evaluation", "config": asdict(config), **figures}


def savings(config: EvaluationSettings, results: Record, n_problems: int, decoding: Decoding) -> str:
    """What was done, and what it cost less than one command for each row."""
    n_rows, seconds, loading = len(results["rows"]), results["seconds"], results["seconds_loading"]
    found = f", {results['n_found']} of them from before" if results["n_found"] else ""
    text = f"{n_rows} x {n_problems} problems x {config.n}{found}, in {seconds:.0f} s"
    if decoding.tokens:
        text += f" ({decoding.tokens / seconds:.0f} tokens/s)"
    if n_rows > 1:
        text += f"\nthe base was loaded once, in {loading:.1f} s, instead of {n_rows} times"
        if decoding.rows is not None:
            alone = min(config.max_rows, n_problems * config.n)
            text += f"; {decoding.rows:.0f} rows a forward pass on average, where one adapter alone has {alone} at most"
    return text
