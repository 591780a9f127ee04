"""Threads that wait for each other sleep beside other processes, and stay awake otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from rl_lora.policy import policy
from rl_lora.system import waiting
from rl_lora.system.openmp import openmp_library
from tests import ROOT
from tests.tiny import tiny_model, tiny_tokenizer

N_CORES = os.cpu_count() or 1
pytestmark = pytest.mark.skipif(openmp_library() is None or N_CORES < 2, reason="needs GNU's OpenMP and two cores")
START = f"import os; os.sched_setaffinity(0, range({N_CORES})); import torch; torch.set_num_threads(2)"


def run(code: str, **variables: str) -> list[str]:
    """What a process prints that may use all cores, with these variables and none of the user's own."""
    env = {name: value for name, value in os.environ.items() if name not in waiting.OF_THE_USER} | variables
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", f"{START}\n{code}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


def test_an_idle_team_lets_the_threads_of_others_sleep_and_no_longer_when_it_ends() -> None:
    """Told by the time that the second thread takes after the first has no more work for it."""
    code = """
import statistics, time
from rl_lora.system.openmp import openmp_library
from rl_lora.system.waiting import IdleTeam
x = torch.ones(1 << 18)
team = IdleTeam(openmp_library(), len(os.sched_getaffinity(0)) + 1)
def awake():
    seconds = []
    for _ in range(5):
        x.add_(1)
        begin = time.process_time()
        time.sleep(0.05)
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)
print(awake()); team.start(); time.sleep(0.1); print(awake()); team.stop(); print(awake())
"""
    before, during, after = map(float, run(code))
    assert during < before / 3
    assert during < after / 3


@pytest.mark.parametrize("name", waiting.OF_THE_USER)
def test_a_variable_of_the_users_own_stands(name: str) -> None:
    value = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_PROC_BIND": "false", "OMP_PLACES": "cores"}.get(name, "0")
    code = """
import threading
from rl_lora.system.waiting import watch_neighbours
print(watch_neighbours(), "neighbours" in [thread.name for thread in threading.enumerate()])
"""
    assert run(code, **{name: value}) == ["False", "False"]


def test_a_policy_on_a_cpu_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(policy, "watch_neighbours", lambda: calls.append(1))
    policy.Policy(tiny_model("llama"), tiny_tokenizer(chat_template=False))
    assert calls


class Team:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.runs: list[bool] = [False]

    def start(self) -> None:
        self.runs.append(True)

    def stop(self) -> None:
        self.runs.append(False)


def watched(monkeypatch: pytest.MonkeyPatch, others: list[float], threads: int = 2, cores: int = 2) -> list[bool]:
    """Whether there is an idle team after each tenth of a second in which other processes use so many cores."""

    class End(Exception):
        pass

    def used(cores: set[int]) -> Iterator[tuple[float, float, float]]:
        seconds = everyone = own = 0.0
        yield seconds, everyone, own
        for n in others:
            seconds, everyone, own = seconds + 0.1, everyone + 0.1 * (n + 1.5), own + 0.15
            yield seconds, everyone, own
        raise End

    team, series = Team(), used(set())
    states = []
    here, really_used = threading.current_thread(), waiting._used

    def look(cores: set[int]) -> tuple[float, float, float]:
        if threading.current_thread() is not here:  # another test's policy is watched too
            return really_used(cores)
        states.append(team.runs[-1])
        return next(series)

    monkeypatch.setattr(waiting, "LOOK", 0.0)
    monkeypatch.setattr(waiting, "_used", look)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(End):
        waiting._watch(team, set(range(cores)))  # type: ignore[arg-type]
    return states[2:]


def test_threads_sleep_soon_after_a_neighbour_comes_and_until_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    states = watched(monkeypatch, [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    assert states[:6] == [False] * 6
    assert all(states[6:17])
    assert not any(states[18:])


def test_threads_stay_awake_where_a_core_is_left_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(watched(monkeypatch, [1.0] * 20, threads=2, cores=4))
    assert not any(watched(monkeypatch, [1.0] * 20, threads=1, cores=2))


def test_a_short_burst_of_others_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(watched(monkeypatch, ([0.1] * 9 + [0.9]) * 3))
