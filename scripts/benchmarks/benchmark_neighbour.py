"""What another process on the machine costs: sampling alone, beside a busy process, and beside a second sampler.

All take turns, in rounds. The samplers are processes of their own, which sleep while they are not asked. One more may
be measured whose threads wait as torch has them; beside a neighbour its calls may not end, so they are given a time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

from rich.table import Table

from rl_lora.config import ModelConfig, expand_home
from rl_lora.scripts.benchmarks.measurements import Bench, shape
from rl_lora.scripts.command import main as command
from rl_lora.system.terminal import Terminal
from rl_lora.system.waiting import OF_THE_USER, watch_neighbours

AS_TORCH = {"GOMP_SPINCOUNT": "300000"}
"""Environment of a process whose threads wait as they do by default: the number is the library's own default."""
SETTLE = 1.0
"""Seconds that a neighbour runs, or has been gone, before a measurement."""
ALONE, BUSY, SECOND = "alone", "beside a busy process", "beside a second sampler"


@dataclass
class NeighbourBenchmarkConfig:
    """Measure sampling alone and beside other processes."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(compile=True))
    rollout: str = "8x8x8"
    """Rollout to measure, as prompts x completions x tokens; no completion ends early."""
    rounds: Annotated[int, Ge(1)] = 3
    """Measurements of each kind, after two for warming up."""
    as_torch: bool = False
    """Measure a process whose threads wait as torch has them, too."""
    patience: Annotated[float, Gt(0)] = 20.0
    """Seconds after which a measurement beside a neighbour is given up."""
    out: str = "benchmark_neighbour.json"
    """File for all figures of all rounds."""

    def __post_init__(self) -> None:
        expand_home(self, "out")


class Sampler:
    """A process that samples when it is asked."""

    def __init__(self, config: NeighbourBenchmarkConfig, environment: dict[str, str]):
        self.connection, theirs = multiprocessing.Pipe()
        before = dict(os.environ)
        os.environ |= environment
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve, args=(theirs, config), daemon=True)
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.about: dict[str, Any] = self.connection.recv()

    def seconds(self, patience: float | None = None) -> float | None:
        """Of one rollout; None where it takes longer than `patience`. Then `wait` for it."""
        self.connection.send("sample")
        return self.connection.recv() if self.connection.poll(patience) else None

    def wait(self) -> None:
        self.connection.recv()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, it samples all the time."""
        self.connection.send("sample on")
        time.sleep(SETTLE)
        try:
            yield
        finally:
            self.connection.send("stop")
            self.wait()


def serve(connection: Connection, config: NeighbourBenchmarkConfig) -> None:
    """The process of a sampler, until the other end of the connection closes."""
    bench, case = Bench(config.model), shape(config.rollout)
    bench.fresh()
    prompts = bench.prompts(case.prompts)

    def sample(seed: int) -> float:
        return float(bench.sample(prompts, case, seed)[1]["seconds"])

    for seed in range(2):
        sample(seed)
    connection.send(bench.machine() | {"watched": watch_neighbours()})
    try:
        while True:
            seconds = None
            if connection.recv() == "sample":
                seconds = sample(2)
            else:
                while not connection.poll():
                    sample(2)
                connection.recv()
            connection.send(seconds)
    except EOFError:
        pass


@contextmanager
def busy_process() -> Iterator[None]:
    """Inside, another process computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(SETTLE)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(config: NeighbourBenchmarkConfig) -> dict[str, Any]:
    """Measure, print the table, write the figures."""
    shape(config.rollout)
    console = Terminal()
    with console.status("loading ..."):
        ours, second = (Sampler(config, {}) for _ in range(2))
        sides = {"rl_lora": ours} | ({"as torch has it": Sampler(config, AS_TORCH)} if config.as_torch else {})
    rounds: list[dict[str, dict[str, float | None]]] = []
    for i in range(config.rounds):
        with console.status(f"round {i + 1} of {config.rounds} ..."):
            order = list(sides) if i % 2 == 0 else list(reversed(sides))
            rounds.append({name: measured(sides[name], second, config.patience) for name in order})
    chosen = {name: os.environ[name] for name in (*OF_THE_USER, "OMP_NUM_THREADS") if name in os.environ}
    figures = {"machine": ours.about, "environment": chosen, "config": asdict(config), "rounds": rounds}
    Path(config.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(table(rounds, list(sides), config.patience))
    watched = "watched" if ours.about["watched"] else "not watched"
    variables = ", ".join(f"{name}={value}" for name, value in chosen.items()) or "none"
    console.print(
        f"{config.rollout}, medians of {config.rounds} rounds; rl_lora is {watched}; variables: {variables}\n"
        f"machine  {json.dumps(ours.about)}\nfigures  {config.out}"
    )
    return figures


def measured(sampler: Sampler, second: Sampler, patience: float) -> dict[str, float | None]:
    """Seconds of a rollout by what runs beside it; None where it was given up."""
    seconds: dict[str, float | None] = {}
    for name, neighbour in {ALONE: None, BUSY: busy_process, SECOND: second.busy}.items():
        if neighbour is None:
            time.sleep(SETTLE)
            seconds[name] = sampler.seconds()
            continue
        with neighbour():
            seconds[name] = sampler.seconds(patience)
        if seconds[name] is None:
            sampler.wait()
        time.sleep(SETTLE)
    return seconds


def table(rounds: Sequence[dict[str, dict[str, float | None]]], sides: Sequence[str], patience: float) -> Table:
    result = Table(show_edge=False, pad_edge=False)
    for column in ("threads wait", ALONE, BUSY, "to alone", SECOND, "to alone"):
        result.add_column(column, justify="left" if column == "threads wait" else "right")
    for side in sides:
        cells = []
        alone = [seconds for r in rounds if (seconds := r[side][ALONE]) is not None]
        for name in (ALONE, BUSY, SECOND):
            took = [patience if (seconds := r[side][name]) is None else seconds for r in rounds]
            more = "> " if any(r[side][name] is None for r in rounds) else ""
            cells.append(f"{more}{statistics.median(took):.2f} s")
            if name != ALONE:
                ratio = statistics.median(s / a for s, a in zip(took, alone, strict=True))
                cells.append(f"{more}{ratio:.2f}")
        result.add_row(side, *cells)
    return result


def main() -> None:
    command(NeighbourBenchmarkConfig, run)


if __name__ == "__main__":
    main()
