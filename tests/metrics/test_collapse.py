"""A policy that gives one reply to everything, or that no longer varies, is named: in a run and in an evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.results import results_of
from rl_lora.metrics.collapse import MIN_PROBLEMS, WINDOW, most_common_reply, reply_warning, training_warnings
from rl_lora.metrics.summary import summarize


def held_out(replies: list[str], prompts: list[str] | None = None) -> list[dict[str, Any]]:
    """One sample of each problem, as an evaluation holds it."""
    prompts = prompts or [f"Problem {i}?" for i in range(len(replies))]
    return [
        {
            "adapter": "policy",
            "problem": i,
            "seed": i,
            "observations": [prompt],
            "completions": [reply],
            "answer": None,
            "reward": 1.0,
            "reward_parts": {},
            "success": True,
            "truncated": False,
            "unscorable": False,
            "tokens": 1,
        }
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


def test_one_reply_to_nearly_every_problem_is_named_with_its_share() -> None:
    rng = random.Random(0)
    for n in (MIN_PROBLEMS, 20, 100):
        n_equal = -(-9 * n // 10)
        replies = ["2"] * n_equal + [f"the answer is {i}" for i in range(n - n_equal)]
        rng.shuffle(replies)
        warning = reply_warning(held_out(replies), held_out([str(i) for i in range(n)]))
        assert warning is not None
        assert "'2'" in warning
        assert f"{n_equal / n:.0%} of the held-out replies" in warning
        assert f"the most common reply was {1 / n:.0%}" in warning
        assert summarize(held_out(replies))["same_reply"] == n_equal / n
        replies = ["2"] * (n_equal - n // 5 - 1) + [str(i) for i in range(n - n_equal + n // 5 + 1)]
        assert reply_warning(held_out(replies)) is None


def test_equal_replies_to_equal_or_few_prompts_say_nothing() -> None:
    assert most_common_reply(held_out(["5"] * 50, ["Guess my number."] * 50)) is None
    assert most_common_reply(held_out(["5"] * (MIN_PROBLEMS - 1))) is None
    assert summarize(held_out(["5"] * 3))["same_reply"] is None


def test_layout_does_not_make_two_replies_of_one_and_an_empty_reply_is_one() -> None:
    warning = reply_warning(held_out(["a  b", "a b\n"] * 5))
    assert warning is not None
    assert "100% of the held-out replies are the same, 'a b'" in warning
    assert "an empty text" in (reply_warning(held_out([""] * 10)) or "")


def records(
    entropy: Sequence[float | None], equal: Sequence[float | None], solved: float = 0.0
) -> list[dict[str, Any]]:
    return [
        {"entropy": e, "groups_without_signal": g, "groups_solved": solved} for e, g in zip(entropy, equal, strict=True)
    ]


def test_entropy_that_collapsed_is_named_and_entropy_that_fell_is_not() -> None:
    n = 4 * WINDOW
    falling = [0.8 * 0.7**i for i in range(n)]
    (warning,) = training_warnings(records(falling, [0.5] * n))
    assert "entropy has collapsed, from 0.44 nats" in warning
    assert training_warnings(records([0.8 - 0.03 * i for i in range(n)], [0.5] * n)) == []
    assert training_warnings(records([0.005] * n, [0.5] * n)) == [], "it was so from the beginning"
    assert training_warnings(records(falling[: 2 * WINDOW - 1], [0.5] * (2 * WINDOW - 1))) == []
    assert training_warnings(records(falling, [None] * n)) == [], "demonstrations are there to be sure of"


def test_groups_without_signal_are_named_unless_they_are_solved() -> None:
    n = 2 * WINDOW
    (warning,) = training_warnings(records([0.5] * n, [0.0] * WINDOW + [0.95] * WINDOW))
    assert "95% of the groups of the last 5 steps had equal rewards, and 0% were solved" in warning
    assert training_warnings(records([0.5] * n, [1.0] * n, solved=0.9)) == []


def test_an_evaluation_names_the_adapter_that_gives_one_reply() -> None:
    rows = [held_out([str(i) for i in range(10)]), held_out(["2"] * 10), held_out([str(-i) for i in range(10)])]
    results = results_of(EvaluateConfig(), {"stuck": Path("stuck"), "fine": Path("fine")}, rows)
    (warning,) = results["warnings"]
    assert warning.startswith("stuck: 100% of the held-out replies are the same, '2'")
    assert [row["same_reply"] for row in results["rows"]] == pytest.approx([0.1, 1.0, 0.1])
