"""Rewards for length: the papers' formulas, and that no verdict is ever touched by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rl_lora.envs  # noqa: F401
from rl_lora.config import RolloutConfig, TrainConfig
from rl_lora.learner.advantages import advantages
from rl_lora.policy.policy import Policy
from rl_lora.rollout.shaping import brevity, overlong, shaped
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.settings.validation import validate
from rl_lora.trainer.trainer import train
from rl_lora.types import Episode, Group, Stop, Turn
from tests.rollout.test_worker import GuessEnv
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer
from tests.trainer.test_trainer import metrics, problems, tiny_config


def episode(n_tokens: int, success: bool | None, reward: float = 0.0) -> Episode:
    turn = Turn((1,), (2,) * n_tokens, (0.0,) * n_tokens, Stop.END)
    return Episode("Env-v0", 0, (turn,), reward, Stop.END, success=success)


def group(*episodes: Episode) -> Group:
    return Group("Env-v0", 0, None, episodes)


@pytest.mark.parametrize(
    "n_tokens, value", [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1)]
)
def test_an_overlong_reply_is_punished_linearly_up_to_the_limit(n_tokens: int, value: float) -> None:
    assert overlong(n_tokens, max_tokens=100, margin=20) == pytest.approx(value)


def test_of_solved_episodes_the_shorter_earns_more_and_an_unsolved_one_nothing() -> None:
    values = brevity(group(*(episode(n, s) for n, s in [(10, True), (20, True), (30, True), (10, False), (30, False)])))
    assert values == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert brevity(group(episode(7, True), episode(7, False))) == [0.0, 0.0]
    assert brevity(group()) == []
    with pytest.raises(ValueError, match=r"rollout.brevity_weight needs a verdict of each episode, but Env-v0"):
        brevity(group(episode(1, None)))


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=8))
def test_brevity_is_kimis_formula(plays: list[tuple[int, bool]]) -> None:
    values = brevity(group(*(episode(*play) for play in plays)))
    lengths = [n for n, _ in plays]
    for (n, solved), value in zip(plays, values, strict=True):
        spread = max(lengths) - min(lengths)
        expected = 0.5 - (n - min(lengths)) / spread if spread else 0
        assert value == (expected if solved else min(0, expected))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.5, 0.25)])
def test_parts_are_reported_before_their_weight_and_added_with_it(weights: tuple[float, float]) -> None:
    config = RolloutConfig(max_tokens=100, overlong_tokens=20, overlong_weight=weights[0], brevity_weight=weights[1])
    before = group(episode(100, True, 1.0), episode(90, False, 0.0), episode(20, True, 1.0))
    after = shaped(before, config)
    assert [e.reward_parts for e in after.episodes] == [
        {"overlong": -1.0, "brevity": -0.5},
        {"overlong": -0.5, "brevity": -0.375},
        {"overlong": 0.0, "brevity": 0.5},
    ]
    for old, new in zip(before.episodes, after.episodes, strict=True):
        parts = new.reward_parts
        assert new.reward == old.reward + weights[0] * parts["overlong"] + weights[1] * parts["brevity"]
        assert (new.success, new.turns) == (old.success, old.turns)
    assert shaped(before, RolloutConfig(max_tokens=100)) == before
    solved = group(episode(5, True, 1.0), episode(9, True, 1.0))
    assert advantages(solved, "mean") is None
    assert (advantages(shaped(solved, config), "mean") is None) == (weights[1] == 0)


def test_every_reply_of_an_episode_counts() -> None:
    policy = Policy(tiny_model("llama"), tiny_tokenizer(True))

    def collect(**changes: Any) -> list[Group]:
        config = RolloutConfig(max_tokens=6, max_turns=5, **changes)
        worker = RolloutWorker(GuessEnv, NativeSampler(policy), policy.chat, config)
        return [shaped(group, config) for group in worker.collect([3, 4, 5], adapters=[None], n=6)]

    plain, punished = collect(), collect(overlong_tokens=3, overlong_weight=2.0, brevity_weight=0.0)
    for old, new in zip([e for g in plain for e in g.episodes], [e for g in punished for e in g.episodes], strict=True):
        penalty = sum(min(0.0, (3 - len(turn.completion_ids)) / 3) for turn in old.turns)
        assert new.reward_parts["overlong"] == pytest.approx(penalty)
        assert new.reward == pytest.approx(old.reward + 2 * penalty)
        assert {name: new.reward_parts[name] for name in old.reward_parts} == old.reward_parts
        assert (new.success, new.stop, new.turns) == (old.success, old.stop, old.turns)
    assert len({len(e.turns) for g in plain for e in g.episodes}) > 1


def test_accuracy_is_reported_apart_from_a_shaped_reward(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, "llama")
    shaping = {"rollout__overlong_tokens": 6, "rollout__overlong_weight": 3.0, "rollout__brevity_weight": 0.5}
    plain, other = (
        train(tiny_config(model, tmp_path / name, steps=1, rollout__group_size=6, **changes))
        for name, changes in (("plain", {}), ("shaped", shaping))
    )
    (before, mine), (after, theirs) = metrics(plain)[:2], metrics(other)[:2]  # evaluation before training, first step
    assert [record["kind"] for record in (before, mine, after, theirs)] == ["eval", "train"] * 2
    times = {"seconds/evaluate"}
    assert {k: v for k, v in before.items() if k not in times} == {k: v for k, v in after.items() if k not in times}
    assert 0 < before["accuracy"] < 1
    assert mine["accuracy"] == theirs["accuracy"]
    assert theirs["reward"] < mine["reward"] - 1
    parts = 3 * theirs["parts/overlong"] + 0.5 * theirs["parts/brevity"]
    assert theirs["reward"] == pytest.approx(mine["reward"] + parts)
    assert [s["success"] for s in problems(plain)] == [s["success"] for s in problems(other)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"overlong_tokens": 17}, r"overlong_tokens must be <= rollout.max_tokens=16, got 17"),
        ({"overlong_tokens": -1}, r"overlong_tokens must be >= 0"),
        ({"overlong_weight": -1.0}, r"overlong_weight must be >= 0 and finite, got -1.0"),
        ({"brevity_weight": -0.5}, r"brevity_weight must be >= 0 and finite, got -0.5"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig(rollout=RolloutConfig(**changes)))
