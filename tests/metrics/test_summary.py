"""Figures of samples: rows, intervals, and the differences between rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.metrics.estimates import clustered, pass_at_k, wilson
from rl_lora.metrics.summary import Evaluation, pairs, summarize, table_row
from rl_lora.types import Episode, Stop, Turn


def episode(reward: float, success: bool | None, seed: int = 0, stop: Stop = Stop.END) -> Episode:
    return Episode("e", seed, (Turn((1,), (2,), (-1.0,), Stop.END),), reward, stop, success=success)


def test_the_score_is_accuracy_or_else_the_mean_reward() -> None:
    judged = Evaluation("a", ((episode(0.9, False),), (episode(0.1, True, 1),)))
    assert judged.score == judged.record["accuracy"] == 0.5
    unjudged = Evaluation("a", ((episode(0.9, None), episode(0.5, None)),))
    assert unjudged.record["accuracy"] is None
    assert "accuracy_low" not in unjudged.record
    assert unjudged.score == pytest.approx(0.7)
    unscorable = Evaluation("a", ((episode(0.0, None, stop=Stop.UNSCORABLE),),))
    assert unscorable.record["unscorable"] == 1.0
    assert unscorable.score == -math.inf


def sample(problem: int, k: int, success: bool | None, answer: str | None = None, **more: Any) -> dict[str, Any]:
    given = {"adapter": "a", "problem": problem, "k": k, "success": success, "answer": answer, "reward": 0.25}
    rest = {"unscorable": False, "truncated": False, "tokens": 3, "completions": ["x"], "reward_parts": {}}
    return given | rest | more


def test_a_row_leaves_unscorable_samples_out_of_the_figures_and_counts_them() -> None:
    samples = [sample(0, k, k < 2, str(k < 2)) for k in range(4)]
    samples += [sample(1, 0, True, "True"), *(sample(1, k, None, unscorable=True, reward=0.0) for k in (1, 2, 3))]
    found = table_row(samples, [1, 2, 4])
    assert (found["n_problems"], found["n_samples"], found["episodes"]) == (2, 8, 5)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert (found["unscorable"], found["reward"]) == (3 / 8, 0.25)
    assert (found["accuracy_low"], found["accuracy_high"]) == clustered([2, 1], [4, 1])
    assert found["pass"]["1"]["value"] == pytest.approx((0.5 + 1) / 2)
    assert found["pass"]["2"]["value"] == pytest.approx(pass_at_k(4, 2, 2))  # the other problem has one verdict
    assert found["pass"]["4"]["value"] == 1.0
    assert found["majority"]["4"]["value"] == pytest.approx(0.5)  # two answers with two votes each
    assert "1" not in found["majority"]


def test_one_sample_a_problem_has_wilsons_interval_everywhere() -> None:
    found = table_row([sample(i, 0, i < 30) for i in range(100)], [1])
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(30, 100)
    assert found["pass"]["1"] == {"value": 0.3, "low": wilson(30, 100)[0], "high": wilson(30, 100)[1]}
    assert found["majority"] == {}


def test_a_majority_needs_answers_and_format_is_the_rewards_part_or_the_share_of_answers() -> None:
    silent = table_row([sample(0, k, False) for k in range(2)], [1, 2])
    assert (silent["majority"], silent["format"]) == ({}, None)
    assert summarize([sample(0, 0, True, "7"), sample(1, 0, False)])["format"] == 0.5
    formatted = [
        sample(0, 0, True, "7", reward_parts={"format": 0.0}),
        sample(1, 0, False, reward_parts={"format": 0.0}),
    ]
    assert summarize(formatted)["format"] == 0.0


def test_pairs_compare_rows_on_the_problems_that_both_have_verdicts_on() -> None:
    a = [sample(i, 0, i < 8) for i in range(10)]
    b = [sample(i, 0, i < 3) for i in range(9)] + [sample(9, 0, None, unscorable=True)]
    nothing = [sample(i, 0, None) for i in range(10)]
    matrix = pairs([a, b, nothing], 1)
    assert matrix[0][1] is not None
    assert matrix[1][0] is not None
    assert matrix[0][1]["difference"] == pytest.approx(5 / 9)
    assert matrix[0][1]["p"] == pytest.approx(2 / 2**5)
    assert 0 < matrix[0][1]["low"] < 5 / 9 < matrix[0][1]["high"] <= 1
    assert matrix[1][0]["low"] == -matrix[0][1]["high"]
    assert matrix[1][0]["difference"] == -matrix[0][1]["difference"]
    assert [matrix[i][i] for i in range(3)] == [None] * 3
    assert matrix[0][2] is matrix[2][0] is None
    assert pairs([a], 1) == [[None]]
