"""What hangs is named: a user's code, and the lock of the model cache."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import rl_lora.policy.default_model
import rl_lora.system.watchdog
from rl_lora.config import RolloutConfig
from rl_lora.envs import SingleTurnEnv, TextEnv
from rl_lora.envs.text import Problem
from rl_lora.policy.policy import Policy
from rl_lora.rollout.contract import reset_env, step_env
from rl_lora.rollout.worker import EpisodeRequest, RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.system.watchdog import AGAIN, PATIENCE, Wait, watched
from tests import tiny_reward
from tests.tiny import tiny_model, tiny_tokenizer


class Asked(SingleTurnEnv):
    def problem(self, seed: int) -> Problem:
        return Problem("Say it.", 3)


class Slow(TextEnv):
    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        time.sleep(0.4)
        return "Say it.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_lora.system.watchdog, "LOOK", 0.05)
    with watched("the watcher of an earlier test", patience=1000):
        time.sleep(1.1)  # it may sleep for as long as it was told to then
    monkeypatch.setattr(rl_lora.system.watchdog, "PATIENCE", 0.2)


def test_a_call_that_hangs_is_named_with_its_function_problem_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    env = Asked({"numeric": 1.0, "tests.tiny_reward:slow": 0.5})
    reset_env(env, 3)
    step_env(env, 3, "four")
    said = capsys.readouterr().err
    assert said.startswith("Asked, seed 3: the reward numeric + tests.tiny_reward:slow has not answered for 0 s")
    assert f"({tiny_reward.__file__}, line " in said
    assert "in slow)" in said
    reset_env(Slow(), 5)
    assert capsys.readouterr().err.startswith("Slow, seed 5: reset() has not answered for 0 s")


def test_a_call_is_named_after_one_five_and_ten_minutes_and_every_ten_from_there_on() -> None:
    wait = Wait("a call", PATIENCE, begin=0.0)
    due = []
    for _ in range(6):
        due.append(wait.due / 60)
        wait.n_said += 1
    assert due == [*AGAIN, 20, 30, 40]


def test_the_lock_of_the_model_cache_is_named_while_another_process_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "smollm2"
    folder.parent.mkdir()
    monkeypatch.setattr(rl_lora.policy.default_model, "default_model_folder", lambda: folder)
    monkeypatch.setattr(rl_lora.policy.default_model, "LOCK_PATIENCE", 0.2)
    looked: list[float] = []

    def complete(folder: Path) -> bool:  # the other process is done while we wait
        looked.append(time.monotonic())
        return len(looked) > 1

    monkeypatch.setattr(rl_lora.policy.default_model, "is_complete", complete)
    with Path(f"{folder}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.6, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        assert rl_lora.policy.default_model.prepare_default_model() == folder
    assert f"{folder}.lock: another process has held this lock of the model cache for 0 s" in capsys.readouterr().err


def test_a_reward_that_hangs_in_a_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(tiny_model("llama"), tiny_tokenizer(True))
    config = RolloutConfig(max_tokens=2)
    worker = RolloutWorker(lambda: Asked("tests.tiny_reward:slow"), NativeSampler(policy), policy.chat, config)
    worker.play([EpisodeRequest(None, 3, 3)])
    said = capsys.readouterr().err
    assert said.startswith("Asked, seed 3: the reward tests.tiny_reward.slow has not answered for 0 s")
    assert "in slow)" in said
