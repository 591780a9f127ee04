"""Every operation on a file that a command does, and what is there if the process dies just before it, or half way in
it: `python -m tests.crash_points FOLDER SCENARIO,... [N_RANDOM]`.

Each point is one process that dies there and one that does the work again, both forked from one that has imported all.
What they leave must be what the work leaves that nothing cut.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora import EvaluateConfig, Policy, evaluate, save_adapter
from rl_lora.config import EnvConfig, ModelConfig, TrainConfig
from rl_lora.trainer.trainer import train
from tests.tiny import randomize, tiny_folder
from tests.trainer.test_trainer import adapter_hash, evals, tiny_config, without_times

DIED = 77
TASK = {"reward": "tests.tiny_reward:voting", "template": "{a}+{b}", "digits": 2}


class Point(NamedTuple):
    """The number of an operation, what it is, and whether half of it is done."""

    number: int
    what: str
    half: bool = False


class Operations:
    """Counts what is done to files in a folder from here on, for good; dies at a point."""

    def __init__(self, folder: Path, point: Point | None):
        self.folder, self.point = str(folder), point
        self.done: list[str] = []
        operations, fsync, open_ = self, os.fsync, io.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                operations.count("write", self.name)
                if operations.is_point(half=True):
                    super().write(memoryview(data)[: len(data) // 2])
                    os._exit(DIED)
                return super().write(data)

        def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not self.watches(file) or not set(mode) & set("wax+"):
                return open_(file, mode, *args, **kwargs)
            buffered = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, kwargs.get("encoding"), kwargs.get("errors"), kwargs.get("newline"))

        def fsync_watched(descriptor: int) -> None:
            self.count("fsync", descriptor)
            fsync(descriptor)

        os.fsync, io.open, builtins.open = fsync_watched, open_watched, open_watched  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.count("open", args[0])
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            self.count(event, args[0], args[-1])
        elif event == "os.rename":
            self.count(event, args[1])
        elif event == "os.truncate":
            self.count(event, args[0])

    def watches(self, file: Any, descriptor: int = -1) -> bool:
        if isinstance(file, int) or descriptor >= 0:
            inside = "" if isinstance(file, int) else f"/{os.fspath(file)}"
            file = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else descriptor}") + inside
        return os.path.abspath(os.fspath(file)).startswith(self.folder)

    def count(self, what: str, file: Any, descriptor: int = -1) -> None:
        if self.watches(file, descriptor):
            self.done.append(f"{what} {file}".replace(f"{self.folder}/", ""))
            if self.is_point(half=False):
                os._exit(DIED)

    def is_point(self, half: bool) -> bool:
        return self.point is not None and (self.point.number, self.point.half) == (len(self.done) - 1, half)


def in_child(work: Callable[[], object], log: Path) -> int:
    """The exit code of a forked process that does the work; what it says goes to a file."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    with suppress(BaseException):
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Scenario(NamedTuple):
    """`work` is done in `folder`, as `prepare` left it, and `again` if it dies."""

    folder: Path
    work: Callable[[], object]
    again: Callable[[], object]
    left: Callable[[], object]
    prepare: Callable[[], object]


def figures(results: Any, folder: Path) -> Any:
    """Without times, hashes that they enter into, and what is found instead of drawn."""
    if isinstance(results, dict):
        timed = ("seconds", "hash", "n_found", "n_drawn", "rows_per_pass", "rollout_tokens_per", "learn_tokens_per")
        return {k: figures(v, folder) for k, v in results.items() if not k.startswith(timed) or k == "hashes"}
    return results


def damage(run_dir: Path) -> None:
    """As a process that died may leave it, and a disk."""
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    (checkpoints[-1] / "optimizer.pt").write_bytes(b"")
    shutil.copytree(checkpoints[0], run_dir / "checkpoints" / ".partial-step-000003-0a")
    shutil.copytree(checkpoints[0], run_dir / "checkpoints" / ".removed-step-000000-0a")
    (run_dir / "summary.json.partial").write_text("{")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')


def training(config: TrainConfig, first: TrainConfig | None = None, damaged: bool = False) -> Scenario:
    run_dir = Path(config.run_dir)

    def left() -> object:
        summary = json.loads((run_dir / "summary.json").read_text())
        samples = {path.name: path.read_text() for path in (run_dir / "samples").iterdir()}
        checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        names = sorted(path.name for path in run_dir.iterdir())
        run = without_times(run_dir), adapter_hash(run_dir), evals(run_dir), samples
        return [*run, figures(summary, run_dir), checkpoints, names]

    def prepare() -> None:
        if first is not None:
            train(first)
        if damaged:
            damage(run_dir)

    again = replace(config, resume=True)
    return Scenario(run_dir, lambda: train(config), lambda: train(again), left, prepare)


def evaluation(config: EvaluateConfig, first: EvaluateConfig | None = None) -> Scenario:
    out = Path(config.out)

    def left() -> object:
        results = json.loads((out / "results.json").read_text())
        texts = {path.name: path.read_text() for path in out.glob("*.jsonl")}
        return [figures(results, out), texts, sorted(path.name for path in out.iterdir())]

    prepare = (lambda: None) if first is None else (lambda: evaluate(first))
    return Scenario(out, lambda: evaluate(config), lambda: evaluate(config), left, prepare)


def scenarios(folder: Path) -> dict[str, Scenario]:
    """A run; one that is made longer; one whose files are damaged; an evaluation; another one in the same folder."""
    model = tiny_folder(folder, "llama")
    policy = Policy.load(str(model), dtype="float32")
    for seed, name in enumerate("ab"):
        save_adapter(randomize(policy.bank.add(name, rank=2, seed=seed), seed), folder / name, policy.name)

    def run(name: str, **changes: Any) -> TrainConfig:
        size = {"rollout__prompts_per_step": 2, "rollout__max_tokens": 4, "eval__episodes": 3, "eval__every": 1}
        every = {"checkpoint__every": 1, "checkpoint__keep": 1}
        return tiny_config(model, folder / name, **(size | every | changes))

    def asked(name: str, **changes: Any) -> EvaluateConfig:
        asked = EvaluateConfig(
            adapters=[str(folder / name) for name in "ab"],
            model=ModelConfig(name=str(model), dtype="float32"),
            env=EnvConfig(kwargs=dict(TASK)),
            limit=4,
            n=2,
            temperature=1.0,
            max_tokens=3,
            max_rows=2,
            out=str(folder / name),
        )
        return replace(asked, **changes)

    two = {"checkpoint__keep": 2}
    other = {"adapters": [str(folder / "b")], "limit": 6}
    return {
        "run": training(run("run", steps=3)),
        "longer": training(run("longer", steps=3, resume=True), run("longer", steps=2)),
        "damaged": training(run("damaged", steps=3, resume=True, **two), run("damaged", steps=2, **two), damaged=True),
        "evaluation": evaluation(asked("evaluation")),
        "other": evaluation(asked("other", **other), asked("other")),
    }


def points_of(scenario: Scenario, log: Path) -> tuple[list[Point], object]:
    """All points of a scenario, and what it leaves when nothing cuts it. What it imports is imported here, too."""
    report = log.with_suffix(".operations")

    def counted() -> None:
        operations = Operations(scenario.folder, None)
        scenario.work()
        report.write_text(json.dumps([operations.done, list(sys.modules)]))

    if in_child(counted, log):
        raise RuntimeError(log.read_text())
    done, modules = json.loads(report.read_text())
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)
    points = [Point(number, what) for number, what in enumerate(done)]
    points += [Point(number, what, half=True) for number, what in enumerate(done) if what.startswith("write ")]
    left = scenario.left()
    return sorted(points), left


def check(scenario: Scenario, points: list[Point], expected: object, before: Path, log: Path) -> list[str]:
    """What is wrong, of all points."""
    wrong = []
    for point in points:
        shutil.rmtree(scenario.folder, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, scenario.folder)

        def cut(point: Point = point) -> None:
            Operations(scenario.folder, point)
            scenario.work()

        if (code := in_child(cut, log)) != DIED:
            wrong.append(f"{point}: ended with {code} instead of dying: {log.read_text()[-2000:]}")
        elif in_child(scenario.again, log):
            wrong.append(f"{point}: {log.read_text()[-2000:]}")
        elif scenario.left() != expected:
            wrong.append(f"{point}: leaves something else")
    return wrong


def main(folder: Path, names: str, n_random: int | None = None) -> None:
    """Prints, for each scenario, how many points there are, how many were tried, and what is wrong."""
    torch.set_num_threads(1)
    all_scenarios, results = scenarios(folder), {}
    for name in names.split(","):
        scenario, log, before = all_scenarios[name], folder / f"{name}.log", folder / f"{name}.before"
        if in_child(scenario.prepare, log):
            raise RuntimeError(log.read_text())
        if scenario.folder.exists():
            shutil.copytree(scenario.folder, before)
        points, expected = points_of(scenario, log)
        tried = points if n_random is None else random.sample(points, n_random)
        wrong = check(scenario, tried, expected, before, log)
        results[name] = {"points": len(points), "tried": len(tried), "wrong": wrong}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
