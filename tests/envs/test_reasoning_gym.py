"""Problems of reasoning-gym's generators: seeds, sides, verdicts, demonstrations. Real ones, where it is installed."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_lora.envs  # noqa: F401
from rl_lora.envs.reasoning_gym import HASHED, RUNS_REPLIES, ReasoningGymEnv
from tests import ROOT

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'rl_lora[reasoning-gym]'")

LEGS: dict[str, Any] = {
    "dataset": "leg_counting",
    "config": {"min_animals": 2, "max_animals": 2},
    "demonstration": "{worked}",
    "reward": "numeric",
}
SEEDS = st.integers(0, 2**40)


def test_it_is_an_environment() -> None:
    env = gym.make("rl_lora/ReasoningGym-v0", disable_env_checker=True, **LEGS)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.unwrapped.n_problems is None  # type: ignore[attr-defined]


def test_a_seed_is_a_problem_in_every_copy_and_process() -> None:
    names = ["leg_counting", "gsm_symbolic", "spell_backward"]
    code = (
        "from rl_lora.envs.reasoning_gym import ReasoningGymEnv as E\n"
        f"print([E(name).reset(seed=s)[0] for name in {names} for s in range(5)])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.strip() == str([ReasoningGymEnv(name).reset(seed=s)[0] for name in names for s in range(5)])
    for name in names:
        assert len({ReasoningGymEnv(name).reset(seed=s)[0] for s in range(100)}) > 95


def test_no_question_is_on_both_sides_even_where_there_are_few() -> None:
    train, held_out = ReasoningGymEnv("coin_flip"), ReasoningGymEnv("coin_flip", split="eval")
    sides = [{env.reset(seed=s)[0] for s in range(1000)} for env in (train, held_out)]
    assert all(sides)
    assert len(sides[0]) + len(sides[1]) < 400  # that few: by chance they would meet
    assert not sides[0] & sides[1]


@given(SEEDS, st.sampled_from(["leg_counting", "chain_sum"]))
@settings(max_examples=60, deadline=None)
def test_a_worked_solution_is_right_at_every_step(seed: int, dataset: str) -> None:
    env = ReasoningGymEnv(dataset, demonstration="{worked}", reward="numeric")
    _, info = env.reset(seed=seed)
    sides = info["demonstration"].split(" = ")
    assert sides[-1] == info["reference"]
    assert len(sides) == len(set(sides))
    assert {eval(side) for side in sides} == {int(info["reference"])}  # products and sums of numbers
    *_, outcome = env.step(info["demonstration"])
    assert outcome["is_success"] is True


def test_a_worked_leg_count_counts_the_animals_of_the_question() -> None:
    env = ReasoningGymEnv(**LEGS)
    for seed in range(50):
        question, info = env.reset(seed=seed)
        counts = re.findall(r"(\d+) [a-z ]+", question.rpartition("have ")[2])
        assert re.findall(r"(\d+) \*", info["demonstration"].partition(" = ")[0]) == counts


@pytest.mark.parametrize("dataset", ["chain_sum", "gcd", "word_sorting", "simple_equations"])
def test_the_generator_s_verdict_is_all_or_nothing(dataset: str) -> None:
    env = ReasoningGymEnv(dataset)
    for seed in range(20):
        answer = env.reset(seed=seed)[1]["reference"]
        assert env.step(f" {answer}\n")[1] == 1.0
        env.reset(seed=seed)
        assert env.step(f"<answer>{answer}x</answer> no, <answer> {answer} </answer>, I think")[1] == 1.0
        env.reset(seed=seed)
        _, reward, terminated, _, info = env.step("<answer>no idea</answer>")
        assert (reward, terminated, info["is_success"]) == (0.0, True, False)
        env.reset(seed=seed)
        assert env.step(f"{answer} or {answer}0")[1] == 0.0  # what holds the answer earns a part of the score there


@pytest.mark.parametrize("dataset", ["prime_factorization", "coin_flip", "game_of_life"])
def test_a_reply_that_the_generator_cannot_read_is_wrong(dataset: str) -> None:
    env = ReasoningGymEnv(dataset)
    for reply in ("I do not know", "", "[1, 2", "2 x 3", "<answer>?</answer>"):
        env.reset(seed=3)
        _, reward, _, _, info = env.step(reply)
        assert (reward, info.get("is_success"), info.get("unscorable")) == (0.0, False, None), reply


def test_a_generator_that_cannot_judge_its_own_answer_judges_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    env = ReasoningGymEnv("prime_factorization")
    _, info = env.reset(seed=3)
    monkeypatch.setitem(env._entry, "answer", "no factors")
    assert "prime_factorization's verdict raised" in env.step(info["reference"])[4]["unscorable"]


def test_metadata_demonstrates() -> None:
    _, info = ReasoningGymEnv("gsm_symbolic", demonstration="{answer_cot}").reset(seed=3)
    assert info["demonstration"].endswith(f"#### {info['reference']}")
    question, info = ReasoningGymEnv("gcd", template="Q: {question}\nA:").reset(seed=3)
    assert info["demonstration"] == info["reference"]
    assert question.startswith("Q: ")
    assert question.endswith("\nA:")


def test_no_reply_is_run_as_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoning_gym.factory import DATASETS

    found = set()
    for name, (dataset, _) in DATASETS.items():
        code = inspect.getsource(dataset.score_answer)
        if re.search(r"eval\((?!entry)|parse_expr\(|sympify\(|exec\(", code):
            found.add(name)
    assert found - {"propositional_logic"} <= RUNS_REPLIES  # its parse_expr is its own, and runs nothing
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for name in RUNS_REPLIES & set(DATASETS):
        with pytest.raises(ValueError, match="evaluates a reply as code"):
            ReasoningGymEnv(name)
    ReasoningGymEnv("countdown", reward="numeric")


@pytest.mark.parametrize("dataset", sorted(HASHED))
def test_what_hangs_on_the_order_of_sets_wants_it_fixed(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = "numeric" if dataset in RUNS_REPLIES else None
    for value in (None, "random"):
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        if value:
            monkeypatch.setenv("PYTHONHASHSEED", value)
        with pytest.raises(ValueError, match="PYTHONHASHSEED=0"):
            ReasoningGymEnv(dataset, reward=reward)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    ReasoningGymEnv(dataset, reward=reward)


@pytest.mark.slow
def test_all_other_generators_make_the_same_problems_in_every_process() -> None:
    code = """
import json
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS
shown = {}
for name in DATASETS:
    if name not in ("composite", "word_ladder", "acre"):  # a mixture, a size of its own, minutes a problem
        dataset = create_dataset(name, size=2**20, seed=0)
        shown[name] = [(dataset[i]["question"], dataset[i]["answer"]) for i in (1, 2)]
print("\\n" + json.dumps(shown))  # some of them print dots
"""
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONHASHSEED": h},
            ).stdout.splitlines()[-1]
        )
        for h in ("1", "2")
    )
    assert {name for name in first if first[name] != second[name]} <= HASHED


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "must be a generator of reasoning-gym, got ''; there are"),
        ({"dataset": "leg_countign"}, "leg_countign.*leg_counting"),
        ({"config": {"animals": 3}}, "leg_counting.*animals"),
        ({"config": {"min_animals": 0}}, "min_animals must be positive"),
        ({"config": {"seed": 3}}, "may not set seed"),
        ({"config": "two"}, "config must be a mapping"),
        ({"template": "How many?"}, "template must contain {question}"),
        ({"demonstration": "{wroked}"}, "wroked, and leg_counting has .*worked"),
        ({"dataset": "gcd", "config": {}}, "{worked} is for chain_sum, leg_counting"),
        ({"split": "test"}, "split must be"),
        ({"eval_fraction": 0, "split": "eval"}, "none of 1000 problems.*eval_fraction"),
        ({"reward": "nmeric"}, "no reward is called"),
    ],
)
def test_what_cannot_be_is_said(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGymEnv(**(kwargs if not kwargs else LEGS | kwargs))
