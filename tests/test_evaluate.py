"""The promises of `evaluate.py` and of `environment.held_out`: honest intervals, and problems that are held out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401  registers the environments
from envs import SingleTurnEnv
from envs.text import Problem
from rl_lora.config import EnvConfig, RolloutConfig, TrainConfig
from rl_lora.environment import UNSPLIT_OFFSET, environment, held_out
from rl_lora.evaluate import Evaluation, evaluate, wilson
from rl_lora.native_sampler import NativeSampler
from rl_lora.policy import Policy
from rl_lora.rollout import MakeEnv, RolloutWorker
from rl_lora.trainer import problem_seeds
from rl_lora.types import Episode, Group, Stop, Turn
from tests.test_rollout import GuessEnv
from tests.tiny import randomize, tiny_model, tiny_tokenizer


class Unsplit(SingleTurnEnv):
    """An environment that knows no split, with `n` problems."""

    def __init__(self, n: int = 10**12) -> None:
        super().__init__("length")
        self.n = n

    def problem(self, seed: int) -> Problem:
        return Problem(f"problem {seed % self.n}", None)


@pytest.fixture(autouse=True, scope="module")
def unsplit_is_registered() -> Any:
    gym.register(id="tests/Unsplit-v0", entry_point="tests.test_evaluate:Unsplit")
    yield
    del gym.registry["tests/Unsplit-v0"]


def questions(make_env: MakeEnv, seeds: list[int]) -> list[str]:
    env = make_env()
    return [env.reset(seed=seed)[0] for seed in seeds]


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (113, 256), (3, 4), (0, 1), (1, 1)])
def test_the_interval_holds_the_proportions_that_the_score_test_accepts(successes: int, n: int) -> None:
    p = np.linspace(0, 1, 200_001)[1:-1]
    accepted = p[np.abs(successes / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n)]
    low, high = wilson(successes, n)
    assert low == pytest.approx(0.0 if successes == 0 else accepted.min(), abs=1e-5)
    assert high == pytest.approx(1.0 if successes == n else accepted.max(), abs=1e-5)


def test_the_interval_stays_between_0_and_1_and_is_all_of_it_without_data() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 60):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0.0 <= low <= successes / n + 1e-12
            assert successes / n - 1e-12 <= high <= 1.0


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.3, 2000)
    covered = [low <= 0.3 <= high for low, high in (wilson(int(k), 200) for k in draws)]
    assert 0.93 < np.mean(covered) < 0.97


def test_held_out_problems_are_all_different_and_never_trained_on() -> None:
    config = TrainConfig(env=EnvConfig(kwargs={"digits": 1}))
    make_env, seeds = held_out(config.env, None, 200)
    asked = questions(make_env, seeds)
    assert len(set(asked)) == len(asked) == len(set(seeds))
    assert 5 <= len(asked) < 30  # a tenth of the 100 problems of one digit: no more are there
    trained = {q for step in range(100) for q in questions(environment(config.env), problem_seeds(config, step))}
    assert not trained & set(asked)


def test_as_many_problems_are_held_out_as_were_asked_for_and_always_the_same() -> None:
    make_env, seeds = held_out(EnvConfig(), None, 64)
    assert len(seeds) == len(set(questions(make_env, seeds))) == 64
    assert held_out(EnvConfig(), None, 64)[1] == seeds
    assert held_out(EnvConfig(), None, 32)[1] == seeds[:32]
    assert held_out(EnvConfig(), None, 0)[1] == []


def test_other_arguments_for_evaluation_still_play_the_held_out_side() -> None:
    make_env, seeds = held_out(EnvConfig(kwargs={"digits": 1}), {"template": "{a} and {b}"}, 200)
    held, _ = held_out(EnvConfig(kwargs={"digits": 1}), None, 200)
    assert all(" and " in question for question in questions(make_env, seeds))
    assert questions(held, seeds) == [
        f"What is {a} + {b}? Reply with just the number." for a, b in pairs(make_env, seeds)
    ]


def pairs(make_env: MakeEnv, seeds: list[int]) -> list[tuple[str, str]]:
    return [(a, b) for a, _, b in (question.partition(" and ") for question in questions(make_env, seeds))]


def test_a_split_that_is_named_is_played() -> None:
    make_env, seeds = held_out(EnvConfig(), {"split": "train"}, 8)
    assert questions(make_env, seeds) == questions(environment(EnvConfig()), seeds)


def test_a_file_of_its_own_is_evaluated_on(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        rows = [{"prompt": f"{name} {i}", "answer": i} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "eval.jsonl")}
    make_env, seeds = held_out(EnvConfig("rl_lora/Prompts-v0", paths), None, 100)
    assert sorted(questions(make_env, seeds)) == sorted(f"eval {i}" for i in range(20))


def test_an_environment_without_a_split_is_evaluated_far_from_the_training_seeds() -> None:
    config = EnvConfig("tests/Unsplit-v0")
    _, seeds = held_out(config, None, 16)
    assert seeds == list(range(UNSPLIT_OFFSET, UNSPLIT_OFFSET + 16))
    for seed in (0, 1, 2):
        train = TrainConfig(seed=seed)
        assert not set(seeds) & {s for step in range(100) for s in problem_seeds(train, step)}
    assert len(held_out(EnvConfig("tests/Unsplit-v0", {"n": 5}), None, 16)[1]) == 5
    assert held_out(config, {"n": 7}, 3)[1][0] == UNSPLIT_OFFSET


def test_a_game_that_always_opens_with_the_same_words_is_played_on_every_seed() -> None:
    _, seeds = held_out(EnvConfig("tests/Unsplit-v0", {"n": 1}), None, 5)
    assert seeds == list(range(UNSPLIT_OFFSET, UNSPLIT_OFFSET + 5))


def test_an_environment_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="CartPole-v1 gives ndarray observations; a text environment gives str"):
        held_out(EnvConfig("CartPole-v1"), None, 4)


@pytest.fixture(scope="module")
def worker() -> RolloutWorker:
    policy = Policy(tiny_model("llama"), tiny_tokenizer(True))
    for seed, name in enumerate("abc"):
        randomize(policy.bank.add(name, rank=seed + 1, seed=seed), seed)
    limits = RolloutConfig(max_tokens=4, max_turns=4)
    return RolloutWorker(GuessEnv, NativeSampler(policy), policy.chat, limits)


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (3, 1.0)])
def test_adapters_evaluated_together_score_as_one_by_one(worker: RolloutWorker, n: int, temperature: float) -> None:
    adapters = ["b", None, "a", "c"]
    together = evaluate(worker, range(6), adapters, n=n, temperature=temperature, random_seed=3)
    assert [evaluation.adapter for evaluation in together] == adapters
    replies = [[sample["replies"] for sample in evaluation.samples()] for evaluation in together]
    assert len({str(r) for r in replies}) == 4
    for adapter, evaluation, expected in zip(adapters, together, replies, strict=True):
        (alone,) = evaluate(worker, range(6), [adapter], n=n, temperature=temperature, random_seed=3)
        assert alone.record == evaluation.record
        assert [sample["replies"] for sample in alone.samples()] == expected
        assert [group.seed for group in evaluation.groups] == list(range(6))
        assert ("accuracy_low" in evaluation.record) is (n == 1)  # the interval is for one sample a problem


def test_samples_are_flat_records_that_json_can_hold(worker: RolloutWorker) -> None:
    (evaluation,) = evaluate(worker, [4, 5], ["a"])
    samples = [json.loads(json.dumps(sample)) for sample in evaluation.samples()]
    assert samples == evaluation.samples()
    assert [(s["adapter"], s["env"], s["seed"]) for s in samples] == [("a", "GuessEnv", 4), ("a", "GuessEnv", 5)]
    assert all(len(s["replies"]) == len(s["observations"]) for s in samples)


def episode(reward: float, success: bool | None) -> Episode:
    return Episode("e", 0, (Turn((1,), (2,), (-1.0,), Stop.END),), reward, Stop.END, success=success)


def test_the_score_is_accuracy_or_else_the_mean_reward() -> None:
    judged = Evaluation("a", (Group("e", 0, "a", (episode(0.9, False),)), Group("e", 1, "a", (episode(0.1, True),))))
    assert judged.score == judged.record["accuracy"] == 0.5
    unjudged = Evaluation("a", (Group("e", 0, "a", (episode(0.9, None), episode(0.5, None))),))
    assert unjudged.record["accuracy"] is None
    assert unjudged.score == pytest.approx(0.7)
    unscorable = Evaluation("a", (Group("e", 0, "a", (), 1),))
    assert unscorable.record["unscorable"] == 1.0
    assert unscorable.score == -math.inf
