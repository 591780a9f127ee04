"""Measure rollouts, learning and whole steps on this machine, alone or beside other libraries.

Everything is repeated in rounds in which the sides take turns, and the table shows medians: absolute times on a shared
machine mean little, ratios within one call more. `make peers` prepares the environments of the others.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import LearnerConfig
from rl_lora.learner.learner import Learner
from rl_lora.policy import loading
from rl_lora.scripts.benchmarks.breakdown import Part, breakdown, breakdown_table, naming_fused_kernels
from rl_lora.scripts.benchmarks.measurements import Bench, Shape, shape
from rl_lora.scripts.benchmarks.peer_process import Figures, Peers
from rl_lora.scripts.benchmarks.peers import PEERS
from rl_lora.scripts.configs import BenchmarkConfig
from rl_lora.settings.validation import validate_bounds
from rl_lora.system.terminal import Terminal, in_line
from rl_lora.types import Group

LAST = 3
"""Rounds at the end whose reward is shown apart: what was learned by then."""


def run(config: BenchmarkConfig) -> Figures:
    """Measure, print the tables, write the file."""
    rollouts, steps = ([shape(text) for text in texts] for texts in (config.rollouts, config.steps))
    check(config)
    with naming_fused_kernels() if config.breakdown else nullcontext():
        return measure(config, rollouts, steps)


def check(config: BenchmarkConfig) -> None:
    """Raises ValueError for what cannot be measured."""
    validate_bounds(config)
    if not config.rollouts and not config.steps:
        raise ValueError("there is nothing to measure: name rollouts, or steps")
    if not config.adapters or len(set(config.adapters)) < len(config.adapters):
        raise ValueError(f"adapters must be different numbers, at least one, got {config.adapters}")
    if config.peer and config.adapters != [1]:
        raise ValueError("peers sample without adapters or learn with one: leave adapters out, or the peers")
    for name in config.peer:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are {', '.join(PEERS)}")
        if not Path(python_of(config, name)).exists():
            raise ValueError(
                f"{python_of(config, name)} is not there: run `make peers`, or name the peer's interpreter"
            )
    if config.random and config.peer:
        raise ValueError("peers read a model's folder: with random there is none; save one, and name it as model.name")


def measure(config: BenchmarkConfig, rollouts: list[Shape], steps: list[Shape]) -> Figures:
    console = Terminal(width=None if sys.stdout.isatty() else 120)
    loading.check_model(config.model.name, config.model.trust_remote_code)
    with console.status(Text(f"loading {in_line(config.random or config.model.name)} ...")):
        bench = Bench(config.model, random=config.random, rank=config.rank, seed=config.seed)
        result: Figures = {
            "machine": bench.machine() | {"bytes_per_second": bench.bandwidth()},
            "config": asdict(config),
            "rollouts": [],
            "steps": [],
        }
    for case in rollouts:
        console.print(f"rollouts and learning, {case}: {config.rounds} rounds and one to warm up", style="dim")
        with console.status(f"rollouts and learning, {case} ..."):
            result["rollouts"].append(measure_rollouts(bench, case, config, result["machine"]["bytes_per_second"]))
        console.print(rollout_table(result["rollouts"][-1]))
        for title, parts in result["rollouts"][-1]["breakdown"].items():
            console.print(breakdown_table(f"{case}, {title}: where the time goes", parts))
    for case in steps:
        console.print(f"steps, {case}: {config.rounds} rounds and one to warm up", style="dim")
        with console.status(f"steps, {case} ..."):
            result["steps"].append(measure_steps(bench, case, config))
        console.print(step_table(result["steps"][-1]))
    Path(config.out).write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")
    console.print(f"machine  {json.dumps(result['machine'])}\nfigures  {in_line(config.out)}")
    return result


def python_of(config: BenchmarkConfig, peer: str) -> str:
    return config.vllm_python if peer == "vllm" else config.peer_python


def peers_of(bench: Bench, config: BenchmarkConfig, names: list[str], setup: Figures) -> Peers:
    """Those of the chosen peers that these are."""
    common = {
        "model": str(loading.resolve_model(config.model.name)),
        "dtype": config.peer_dtype or str(bench.policy.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return Peers({name: python_of(config, name) for name in names}, common | setup)


def measure_rollouts(bench: Bench, case: Shape, config: BenchmarkConfig, bandwidth: float) -> Figures:
    """Rounds of sampling, peers and numbers of adapters in turns, and of learning from what was sampled."""
    prompts = bench.prompts(case.prompts)
    job = {"job": "generate", "prompts": prompts, "n": case.n, "max_tokens": case.tokens, "temperature": 1.0}
    rounds: dict[str, list[Figures]] = {}
    sampled: dict[int, list[Group]] = {}
    with peers_of(bench, config, [p for p in config.peer if p != "trl"], {"max_rows": 256}) as peers:
        for i in range(config.rounds + 1):
            bench.fresh(max(config.adapters))
            peak = bench.peak()
            ours: dict[str, Figures] = {}
            for n in config.adapters:
                sampled[n], rollout = bench.sample(prompts, case, i, n)
                sides = {"rollout": rollout | bench.rollout_costs(prompts, case, n)}
                sides["rollout"]["share_of_bandwidth"] = sides["rollout"]["bytes"] / rollout["seconds"] / bandwidth
                if case.n > 1:  # a single completion has nothing to be better than
                    sides["learn"] = bench.learn(sampled[n])
                for name, side in sides.items():
                    ours[with_adapters(name, n)] = side | {"share_of_peak": side["flops"] / side["seconds"] / peak}
            answers = {name: peer.ask(job | {"stop_ids": [], "adapter": None}) for name, peer in peers.items()}
            if i == 0:
                continue  # warming up
            for name, answer in (ours | answers).items():
                rounds.setdefault(name, []).append(answer | {"tokens_per_second": answer["tokens"] / answer["seconds"]})
            rounds.setdefault("peak", []).append({"flops_per_second": peak, "bytes_per_second": bandwidth})
    where: dict[str, list[Part]] = {}
    for n in config.adapters if config.breakdown else ():
        where[with_adapters("rollout", n)] = breakdown(bench.policy, partial(bench.sample, prompts, case, 0, n))
        if case.n > 1:
            where[with_adapters("learning", n)] = breakdown(bench.policy, partial(bench.learn, sampled[n]))
    return {"shape": str(case), "adapters": config.adapters, "rounds": rounds, "breakdown": where}


def with_adapters(name: str, n: int) -> str:
    return name if n == 1 else f"{name}, {n} adapters"


def measure_steps(bench: Bench, case: Shape, config: BenchmarkConfig) -> Figures:
    """Rounds of training steps on the same problems, TRL in turns."""
    n_steps = config.rounds + 1
    first = config.seed * n_steps * case.prompts
    problems = range(first, first + n_steps * case.prompts)
    rounds: dict[str, list[Figures]] = {}
    bench.fresh()
    learner = Learner(bench.policy, LearnerConfig())
    with peers_of(bench, config, [p for p in config.peer if p == "trl"], bench.trl_setup(case, problems)) as peers:
        for i in range(n_steps):
            measured = bench.step(learner, problems[i * case.prompts : (i + 1) * case.prompts], case, i)
            answers = {name: peer.ask({"job": "step"}) for name, peer in peers.items()}
            for name, answer in ({"rl_lora": measured} | answers).items():
                if i:
                    rounds.setdefault(name, []).append(answer)
    return {"shape": str(case), "rounds": rounds}


def median(rounds: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def rollout_table(figures: Figures) -> Table:
    rounds, (first, *others) = figures["rounds"], figures["adapters"]
    table = Table(title=f"{figures['shape']}: prompts x completions x tokens", title_justify="left")
    names = ["", "seconds", "tokens/s", "of the products' peak", "of the bandwidth", "peak memory"]
    for name in [*names, *(["times as long"] if others else [])]:
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    compared = {with_adapters(side, n): with_adapters(side, first) for side in ("rollout", "learn") for n in others}
    for name, of_name in rounds.items():
        if name != "peak":
            shares = [
                f"{median(of_name, key):.0%}" if key in of_name[0] else ""
                for key in ("share_of_peak", "share_of_bandwidth")
            ]
            pairs = zip(of_name, rounds[compared.get(name, name)], strict=True)
            ratio = statistics.median(mine["seconds"] / of_first["seconds"] for mine, of_first in pairs)
            side, *rest = name.partition(",")
            table.add_row(
                "".join([{"rollout": "rl_lora, rollout", "learn": "rl_lora, learning"}.get(side, side), *rest]),
                f"{median(of_name, 'seconds'):.2f}",
                f"{median(of_name, 'tokens_per_second'):.0f}",
                *shares,
                gib(median(of_name, "peak_bytes")),
                *([f"{ratio:.2f}" if name in compared else ""] if others else []),
            )
    peak = {key: median(rounds["peak"], key) for key in ("flops_per_second", "bytes_per_second")}
    table.add_row(
        "peak",
        "",
        "",
        f"{peak['flops_per_second'] / 1e9:.0f} GFLOP/s",
        f"{peak['bytes_per_second'] / 1e9:.0f} GB/s",
    )
    return table


def step_table(figures: Figures) -> Table:
    rounds = figures["rounds"]
    table = Table(title=f"{figures['shape']}: a training step", title_justify="left")
    for name in (
        "",
        "seconds",
        "rollout",
        "learning",
        "sampled tokens",
        "reward",
        "of the last",
        "peak memory",
        "times faster",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for name, of_name in rounds.items():
        pairs = zip(of_name, rounds["rl_lora"], strict=True)
        ratio = statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
        table.add_row(
            name,
            *(f"{median(of_name, key):.2f}" for key in ("seconds", "rollout_seconds", "learn_seconds")),
            f"{median(of_name, 'tokens'):.0f}",
            f"{statistics.fmean(f['reward'] for f in of_name):.3f}",
            f"{statistics.fmean(f['reward'] for f in of_name[-LAST:]):.3f}",
            gib(median(of_name, "peak_bytes")),
            "" if name == "rl_lora" else f"{ratio:.1f}",
        )
    return table


def gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"
