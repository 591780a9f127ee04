"""The curriculum: on simulated success rates it finds the middle and forgets nothing; in a run it can be killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rl_lora.envs  # noqa: F401
from rl_lora.config import EnvConfig, LearnerConfig, RolloutConfig, TrainConfig
from rl_lora.policy.policy import Policy
from rl_lora.rollout.curriculum import Curriculum, curriculum_of
from rl_lora.rollout.environments import environment
from rl_lora.settings.validation import validate
from rl_lora.trainer.problem_order import training_problems
from rl_lora.trainer.trainer import train
from rl_lora.types import Episode, Group, Stop
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import assert_same_run, interrupt, metrics, tiny_config


def played(seed: int, verdicts: list[bool | None]) -> Group:
    episodes = tuple(Episode("Env-v0", seed, (), float(bool(v)), Stop.END, success=v) for v in verdicts)
    return Group("Env-v0", seed, "policy", episodes)


def simulate(curriculum: Curriculum, rates: dict[int, float], steps: int, start: int = 0) -> list[list[int]]:
    """Play problems that succeed at fixed rates, 8 episodes each; returns the problems of each step."""
    chosen = []
    for step in range(start, start + steps):
        problems, _ = curriculum.choose(step)
        rng = np.random.default_rng((7, step))
        curriculum.observe(step, [played(s, list(rng.uniform(size=8) < rates[s])) for s in problems])
        chosen.append(problems)
    return chosen


def mixed(curriculum: Curriculum) -> dict[int, float]:
    """Of ten problems, six are hopeless, two solved, two in reach."""
    return {seed: (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.4, 0.6)[seed % 10] for seed in curriculum.seeds}


def make(n_problems: int = 400, **changes: Any) -> Curriculum:
    return Curriculum(n_problems, **{"n": 16, "explore": 0.5, "half_life": 20.0} | changes)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_problems_near_one_half_are_preferred_and_all_are_still_tried(seed: int) -> None:
    curriculum = make(seed=seed)
    rates = mixed(curriculum)
    chosen = simulate(curriculum, rates, 60)
    in_reach = [sum(0 < rates[s] < 1 for s in problems) / 16 for problems in chosen]
    assert np.mean(in_reach[-30:]) > 0.5  # 0.2 where problems come in their order
    assert set(curriculum.trials) == set(curriculum.seeds)
    counts = {s: sum(s in problems for problems in chosen) for s in rates}
    middle, others = ([n for s, n in counts.items() if (0 < rates[s] < 1) is reach] for reach in (True, False))
    assert np.mean(middle) > 3 * np.mean(others)
    assert max(middle) < 4 * np.mean(middle)  # not a few of them only
    plain = simulate(make(seed=seed, explore=1.0), rates, 50)
    assert sorted(s for problems in plain for s in problems) == sorted([*curriculum.seeds] * 2)  # two epochs


def test_what_is_known_to_teach_nothing_makes_room_for_untried_problems() -> None:
    curriculum = make(explore=0.0)
    chosen = simulate(curriculum, dict.fromkeys(curriculum.seeds, 0.0), 20)
    assert len({s for problems in chosen for s in problems}) == 20 * 16


def test_a_problem_that_was_learned_or_came_into_reach_is_found_out() -> None:
    curriculum = make(100)
    early, late = range(10), range(10, 20)
    before = dict.fromkeys(curriculum.seeds, 0.0) | dict.fromkeys(early, 0.5)
    after = dict.fromkeys(curriculum.seeds, 0.0) | dict.fromkeys(early, 1.0) | dict.fromkeys(late, 0.5)
    chosen = simulate(curriculum, before, 40)
    assert np.mean([sum(s in early for s in problems) for problems in chosen[-10:]]) > 5
    chosen = simulate(curriculum, after, 60, start=40)
    means = [np.mean([sum(s in some for s in problems) for problems in chosen[-20:]]) for some in (early, late)]
    assert means[1] > 5
    assert means[0] < means[1] / 2


def test_a_step_has_as_many_different_problems_as_asked_for_and_spares_beside_them() -> None:
    curriculum = make(50, n=8, n_spare=5, seed=3)
    assert curriculum.first % 50 == 0
    rates = mixed(curriculum)
    for step in range(30):
        problems, spare = curriculum.choose(step)
        assert (problems, spare) == curriculum.choose(step)
        assert (len(problems), len(spare)) == (8, 5)
        assert len({*problems, *spare}) == 13
        assert {*problems, *spare} <= set(curriculum.seeds)
        curriculum.observe(step, [played(s, [rates[s] > 0.5] * 4) for s in problems])


def test_its_state_is_all_there_is(tmp_path: Path) -> None:
    first, second = make(), make()
    rates = mixed(first)
    simulate(first, rates, 20)
    second.restore(json.loads(json.dumps(first.state())))
    assert simulate(first, rates, 10, start=20) == simulate(second, rates, 10, start=20)


def test_the_record_says_what_was_chosen_on() -> None:
    curriculum = make(10, n=2)
    record = curriculum.observe(0, [played(0, [True, True, False, False]), played(1, [False] * 4)])
    assert record == {"curriculum/tried": 0.0, "curriculum/revisited": 0.0, "curriculum/success_rate": None}
    record = curriculum.observe(20, [played(0, [True] * 4), played(2, [True] * 4)])
    assert record == {"curriculum/tried": 0.2, "curriculum/revisited": 0.5, "curriculum/success_rate": 0.5}
    assert curriculum.trials[0] == (5.0, 1.0, 20)  # two of four, a half-life ago, and four of four
    with pytest.raises(ValueError, match=r"Env-v0 gives none: its step\(\) must put a bool into info\['is_success'\]"):
        curriculum.observe(21, [played(3, [None])])
    curriculum.observe(22, [played(4, [])])  # all of its episodes were unscorable
    assert 4 in curriculum.trials


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def finite(model: Path, run_dir: Path, path: Path, **changes: Any) -> TrainConfig:
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": i}) + "\n" for i in range(12)))
    kwargs = {"path": str(path), "eval_path": str(path), "reward": "tests.tiny_reward:ascii_share"}
    changes = {"env": EnvConfig("rl_lora/Prompts-v0", kwargs), "rollout__curriculum": "success_rate"} | changes
    return tiny_config(model, run_dir, steps=6, **changes)


@pytest.mark.parametrize("replaced", [0, 3])
def test_a_run_with_a_curriculum_that_was_killed_and_resumed_is_the_run_that_was_not(
    replaced: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, **changes: Any) -> TrainConfig:
        changes = {"rollout__max_replaced": replaced, "eval__episodes": 0} | changes
        return finite(model, tmp_path / name, tmp_path / "p.jsonl", **changes)

    whole = train(config("whole", eval__episodes=2))
    records = metrics(whole, "train")
    assert records[0]["curriculum/tried"] == 0
    assert records[-1]["curriculum/tried"] == 1
    assert records[-1]["curriculum/revisited"] > 0
    interrupt(monkeypatch, config("killed", eval__episodes=2), "log", 5)
    assert_same_run(train(config("killed", eval__episodes=2, resume=True)), whole)
    plain = metrics(train(config("plain", rollout__curriculum="none")), "train")
    assert not any(name.startswith("curriculum") for name in plain[0])
    assert [r["reward"] for r in plain] != [r["reward"] for r in records]


def test_without_a_finite_list_of_problems_it_is_an_error_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"needs an environment with a finite list .* rl_lora/Arithmetic-v0 makes new"):
        train(tiny_config(model, tmp_path / "run", rollout__curriculum="success_rate"))
    with pytest.raises(ValueError, match=r"prompts_per_step=13 and .*max_replaced=0 need 13, there are 12"):
        train(finite(model, tmp_path / "run", tmp_path / "p.jsonl", rollout__prompts_per_step=13))
    long = finite(model, tmp_path / "run", tmp_path / "long.jsonl")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "9" * 600, "answer": 1}) + "\n")
    long.rollout.prompts_per_step = 1
    with pytest.raises(ValueError, match=r"prompt of rl_lora/Prompts-v0.* tokens"):
        train(long)


def test_all_problems_may_come(model: Path, tmp_path: Path) -> None:
    config = finite(model, tmp_path / "run", tmp_path / "p.jsonl", seed=2)
    curriculum = curriculum_of(config)
    assert curriculum is not None
    assert list(training_problems(config)) == list(curriculum.seeds)
    env = environment(config.env)()
    assert {env.reset(seed=seed)[0] for seed in curriculum.seeds} == {f"{i}?" for i in range(12)}
    config.rollout.curriculum = "none"
    assert curriculum_of(config) is None
    assert len(list(training_problems(config))) == 6 * 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"curriculum_explore": 1.5}, r"rollout.curriculum_explore must be in \[0, 1\], got 1.5"),
        ({"curriculum_half_life": 0}, "rollout.curriculum_half_life must be > 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig(rollout=RolloutConfig(**changes)))
    given = TrainConfig(
        rollout=RolloutConfig(curriculum="success_rate", group_size=1), learner=LearnerConfig(objective="likelihood")
    )
    with pytest.raises(ValueError, match=r"rollout.curriculum must be none for demonstrations"):
        validate(given)
