"""Held-out problems: different ones, never trained on; and what adapters do on them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EnvConfig, RolloutConfig, TrainConfig
from rl_lora.envs import SingleTurnEnv
from rl_lora.envs.text import Problem
from rl_lora.policy.policy import Policy
from rl_lora.rollout.environments import environment
from rl_lora.rollout.held_out import UNSPLIT_OFFSET, evaluate_adapters, held_out
from rl_lora.rollout.worker import MakeEnv, RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.trainer.problem_order import problem_seeds
from tests.rollout.test_worker import GuessEnv
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
    gym.register(id="tests/Unsplit-v0", entry_point="tests.rollout.test_held_out:Unsplit")
    yield
    del gym.registry["tests/Unsplit-v0"]


def questions(make_env: MakeEnv, seeds: list[int]) -> list[str]:
    env = make_env()
    return [env.reset(seed=seed)[0] for seed in seeds]


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
        f"What is {a} + {b}? Reply with just the number." for a, b in operands(make_env, seeds)
    ]


def operands(make_env: MakeEnv, seeds: list[int]) -> list[tuple[str, str]]:
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


def test_data_that_are_for_evaluation_only_can_be_evaluated_and_all_of_them(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": i} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EnvConfig("rl_lora/Math-v0", {"eval_path": str(tmp_path / "test.jsonl"), "template": "{question}"})
    make_env, seeds = held_out(config, None, None)
    assert sorted(questions(make_env, seeds)) == sorted(f"{i}?" for i in range(20))
    with pytest.raises(ValueError, match="no problems for split 'train'"):
        environment(config)
    with pytest.raises(ValueError, match="name a dataset"):
        held_out(EnvConfig("rl_lora/Math-v0"), None, 4)


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
    together = evaluate_adapters(worker, range(6), adapters, n=n, temperature=temperature, random_seed=3)
    assert [evaluation.adapter for evaluation in together] == adapters
    replies = [[sample["completions"] for sample in evaluation.samples()] for evaluation in together]
    assert len({str(r) for r in replies}) == 4
    for adapter, evaluation, expected in zip(adapters, together, replies, strict=True):
        (alone,) = evaluate_adapters(worker, range(6), [adapter], n=n, temperature=temperature, random_seed=3)
        assert alone.record == evaluation.record
        assert [sample["completions"] for sample in alone.samples()] == expected
        assert [episodes[0].seed for episodes in evaluation.problems] == list(range(6))


def test_samples_are_flat_records_that_json_can_hold(worker: RolloutWorker) -> None:
    (evaluation,) = evaluate_adapters(worker, [4, 5], ["a"])
    samples = [json.loads(json.dumps(sample)) for sample in evaluation.samples()]
    assert samples == evaluation.samples()
    assert [(s["adapter"], s["env"], s["seed"]) for s in samples] == [("a", "GuessEnv", 4), ("a", "GuessEnv", 5)]
    assert all(len(s["completions"]) == len(s["observations"]) for s in samples)
