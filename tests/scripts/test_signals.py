"""Ctrl-C, SIGTERM and a launcher that dies: what was finished is kept, and the command that goes on is named."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl_lora.learner.learner import Learner
from rl_lora.scripts.cli import main
from rl_lora.system.interrupts import later
from rl_lora.trainer.checkpoint import Checkpoints
from rl_lora.trainer.trainer import Trainer, train
from tests import ROOT
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import assert_same_run, metrics, tiny_config

ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C, and so do those that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*command: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=pipe, stderr=pipe, text=True)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that: " + "".join(process.communicate(timeout=10)))


def slow_run(model: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A run whose every step takes a tenth of a second and more, with its only checkpoint at the end: its options."""
    config = tiny_config(model, tmp_path / "run", steps=5, eval__every=0, checkpoint__every=100)
    config.env.kwargs["reward"] = "tests.tiny_reward:slow_ascii_share"
    train(config)
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(recorded.replace(str(tmp_path / "run"), str(tmp_path / "cut")))
    return ["--config", str(tmp_path / "config.yaml")], tmp_path / "cut"


def started_by(way: str, folder: Path) -> list[str]:
    """The words that start training by a script, by the module, or by the installed command."""
    if way != "rl-lora":
        return [sys.executable, *way.split()]
    (folder / way).write_text(f"#!{sys.executable}\nfrom rl_lora.scripts.cli import main\nmain()\n", encoding="utf-8")
    (folder / way).chmod(0o755)
    return [str(folder / way), "train"]


@pytest.mark.parametrize(
    ("number", "code", "way"),
    [
        (signal.SIGTERM, 143, "rl-lora"),
        (signal.SIGHUP, 129, "scripts/train.py"),
        pytest.param(signal.SIGINT, 130, "-m rl_lora train", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_with_its_last_finished_step_and_the_command_that_goes_on(
    number: signal.Signals, code: int, way: str, model: Path, tmp_path: Path
) -> None:
    options, run_dir = slow_run(model, tmp_path)
    words = started_by(way, tmp_path)
    process = start(*words, *options)
    wait_until(process, lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir, "train")) >= 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    (checkpoint,) = Checkpoints(run_dir / "checkpoints", 2).whole()
    assert checkpoint.step == metrics(run_dir, "train")[-1]["step"] >= 2
    assert f"step {checkpoint.step} is kept in {checkpoint.folder}" in out
    said = err.strip().rpartition("this goes on from there: ")[2]
    assert said.endswith(shlex.join([*words[1:], *options, "--resume", "true"]))
    again = start(*shlex.split(said))
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"going on from step {checkpoint.step}" in out
    assert_same_run(run_dir, tmp_path / "run")


def test_a_run_under_nohup_outlives_its_terminal(model: Path, tmp_path: Path) -> None:
    options, run_dir = slow_run(model, tmp_path)
    lost, other_end = os.openpty()
    process = subprocess.Popen(
        ["nohup", sys.executable, str(ROOT / "scripts" / "train.py"), *options],
        cwd=tmp_path,
        env=ENVIRON,
        stdout=other_end,
        stderr=other_end,
        stdin=other_end,
    )
    os.close(other_end)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    os.close(lost)
    assert process.wait(timeout=120) == 0
    assert (run_dir / "summary.json").exists()


def test_ctrl_c_while_libraries_are_imported_says_nothing(tmp_path: Path) -> None:
    for delay in (0.3, 1.0):
        process = start(sys.executable, "scripts/train.py", "--run_dir", str(tmp_path / "x"))
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "")


def test_a_program_that_calls_a_command_keeps_its_own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("sys.argv", ["report.py", "there-is-no-such-run"])
    with pytest.raises(SystemExit):
        main("report")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_wait_for_what_must_not_be_cut() -> None:
    done: list[int] = []

    def work(n_signals: int) -> None:
        with later() as hold:
            hold()
            for _ in range(n_signals):
                signal.raise_signal(signal.SIGINT)
            done.append(n_signals)

    for n_signals in (1, 2):  # the second one is meant
        with pytest.raises(KeyboardInterrupt):
            work(n_signals)
    assert done == [1]


def test_an_interrupt_before_weights_move_keeps_the_step_before_and_after_it_the_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward passes of the third step, and in its optimizer step; the evaluation of the second is not over."""
    whole = train(tiny_config(model, tmp_path / "whole", checkpoint__every=100))

    def interrupting(method: Callable[..., Any], call: int) -> Callable[..., Any]:
        calls = itertools.count(1)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return method(*args, **kwargs)

        return interrupted

    for owner, name, call, step in (
        (Learner, "_accumulate", 3, 2),
        (Learner, "_finish", 3, 3),
        (Trainer, "evaluate_if_due", 3, 2),  # before the first step, after the first, after the second
    ):
        config = tiny_config(model, tmp_path / name, checkpoint__every=100)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupting(getattr(owner, name), call))
            with pytest.raises(KeyboardInterrupt):
                train(config)
        latest = Checkpoints(Path(config.run_dir) / "checkpoints", 2).latest()
        assert latest is not None
        assert latest.step == step
        assert latest.state["evaluated"] is not (name == "evaluate_if_due")
        config.resume = True
        assert_same_run(train(config), whole)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_end_too(model: Path, tmp_path: Path) -> None:
    options, run_dir = slow_run(model, tmp_path)
    processes = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    processes += ["--dynamo_backend", "no", "--main_process_port", "0"]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    launcher = start(*accelerate, "launch", *processes, "scripts/train.py", *options)
    wait_until(launcher, lambda: (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir, "train")) >= 2)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len([worker for worker in workers if "train.py" in " ".join(worker.cmdline())]) == 2
    launcher.kill()
    launcher.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 5
