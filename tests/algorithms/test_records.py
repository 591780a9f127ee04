"""A record of an objective or an advantage is all there is to add: help, settings and learner read it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lora.algorithms.advantages import ADVANTAGES, Advantage, advantage
from rl_lora.algorithms.objectives import OBJECTIVES, Aggregation, Objective, Tokens, objective
from rl_lora.algorithms.registry import Record
from rl_lora.config import LearnerConfig, RolloutConfig, TrainConfig
from rl_lora.learner.advantages import advantages
from rl_lora.learner.learner import Learner
from rl_lora.scripts.help import help_page
from rl_lora.scripts.options import parse
from rl_lora.scripts.schema import Usage, schema_of
from rl_lora.settings.algorithm import advantage_of, objective_options
from rl_lora.settings.validation import validate
from rl_lora.trainer.trainer import train
from tests.learner.test_learner import LOOSE, gradients, of, problems
from tests.oracles import Oracle, relative_error, tiny_policy
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import metrics, tiny_config

OWN = """
from rl_lora.algorithms.objectives import objective


@objective(advantage="own_algorithm:leave_one_out")
def cispo(logprobs, behaviour_logprobs, advantages, *, ceiling=5.0):
    '''Clipped weight of a likelihood (CISPO: arXiv:2506.13585, eq. 4).'''
    weight = (logprobs - behaviour_logprobs).exp().detach()
    return weight.clamp(max=ceiling) * advantages * logprobs, weight > ceiling


def leave_one_out(rewards_G):
    return (rewards_G - rewards_G.mean()) * len(rewards_G) / (len(rewards_G) - 1)


def bare(logprobs, behaviour_logprobs, advantages):
    return logprobs * advantages, None
"""

BY_EPISODE = Aggregation(weight=lambda n: 1 / n, share=lambda n: 1)


@objective("episodes", advantage="halved", aggregation=BY_EPISODE)
def over_episodes(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, sharpness: float = 1.0
) -> Tokens:
    """Mean over episodes of their token means."""
    return sharpness * (logprobs - behaviour_logprobs).exp() * advantages, None


@advantage("halved")
def halved(rewards_G: np.ndarray) -> np.ndarray:
    """Half of the reward minus the mean."""
    return 0.5 * (rewards_G - rewards_G.mean())


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES.records, "episodes", over_episodes)
    monkeypatch.setitem(ADVANTAGES.records, "halved", halved)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_algorithm.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_algorithm", raising=False)
    for registry in (OBJECTIVES, ADVANTAGES):
        monkeypatch.setattr(registry, "_own", {})


def config(**learner: Any) -> TrainConfig:
    return TrainConfig(learner=replace(LearnerConfig(), **learner))


@pytest.mark.usefixtures("added")
def test_an_added_objective_and_advantage_are_seen_by_help_options_and_settings() -> None:
    default = TrainConfig()
    page = " ".join(help_page(default, schema_of(default), Usage("train"), "learner").split())
    assert "--learner.objective reinforce|grpo|likelihood|episodes|TEXT" in page
    assert "episodes: Mean over episodes of their token means." in page
    assert "--learner.advantage mean|standardized|none|halved|TEXT|null" in page
    found = parse(TrainConfig, ["--learner.objective", "episodes", "--learner.objective_options.sharpness", "2"])
    validate(found)
    assert advantage_of(found.learner) == "halved"
    assert objective_options(found.learner) == {"sharpness": 2}


@pytest.mark.usefixtures("added")
def test_an_added_objective_is_learned_with_its_advantage_its_aggregation_and_its_options() -> None:
    policy, mine = tiny_policy("llama"), of("a", problems())
    found = gradients(policy, mine, replace(LOOSE, objective="episodes", objective_options={"sharpness": 3.0}))["a"]
    oracle, expected = Oracle(policy, "llama"), torch.zeros_like(found, dtype=torch.float64)
    n_episodes = sum(len(g.episodes) for g in mine)
    for g in mine:
        rewards_G = np.array([e.reward for e in g.episodes])
        for e, a in zip(g.episodes, 0.5 * (rewards_G - rewards_G.mean()), strict=True):
            alone = replace(g, episodes=(e,))
            by_token = oracle.gradients(
                [(alone, [float(a)])], lambda p, q, A: 3.0 * torch.exp(p - q) * A, {"a": e.n_tokens * n_episodes}
            )
            expected += by_token["a"]
    assert relative_error(found, expected) < 1e-4


@pytest.mark.usefixtures("own")
def test_an_objective_and_an_advantage_of_ones_own_module_train_a_model(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "llama")
    own = "own_algorithm:cispo"
    run = tiny_config(model, tmp_path / "run", steps=2, learner__objective=own, learner__updates_per_step=2)
    run.learner.objective_options = {"ceiling": 0.5}
    records = metrics(train(run), "train")
    assert [record["version"] for record in records] == [2, 4]
    assert records[0]["clip_fraction"] > 0.5, "the option did not reach the objective"
    assert advantage_of(run.learner) == "own_algorithm:leave_one_out"
    validate(config(objective="own_algorithm:bare"))
    with (tmp_path / "own_algorithm.py").open("a", encoding="utf-8") as file:
        file.write("# another one\n")
    with pytest.raises(ValueError, match="the source of the objective, or of the advantage, has changed"):
        train(replace(run, steps=3, resume=True))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "learner, message",
    [
        (
            {"objective": "grop"},
            "learner.objective: no objective is named 'grop'; grop may be meant for grpo; there are",
        ),
        ({"advantage": "standardised"}, "standardised may be meant for standardized"),
        ({"objective": "missing_module:f"}, "objective 'missing_module:f': cannot import 'missing_module'"),
        ({"objective": "own_algorithm:cipso"}, "own_algorithm has nothing called 'cipso'; functions: bare,"),
        ({"objective": ":cispo"}, "one of your own is written 'module:function'"),
        ({"objective": "own_algorithm:__name__"}, "has no function, but a str, called"),
        ({"clip_low": 0.1}, "learner.clip_low is an option of the objective grpo, and reinforce does not take it"),
        ({"objective": "grpo", "objective_options": {"clip_low": 0.1}}, "is a setting of its own: --learner.clip_low"),
        ({"objective": "own_algorithm:cispo", "objective_options": {"celing": 1}}, "celing may be meant for ceiling"),
        ({"objective": "own_algorithm:cispo", "objective_options": {"ceiling": "x"}}, "must be like its default, 5.0"),
        ({"objective_options": {"beta": 1.0}}, "the objective reinforce has no option beta; it has none"),
    ],
)
def test_what_names_no_record_or_no_option_is_refused_and_the_nearest_named(
    learner: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"learner\.") as refused:
        validate(config(**learner))
    assert message in str(refused.value)


def test_an_option_called_like_a_setting_has_the_settings_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, clip_high: float = 9.0) -> Tokens:
        return logprobs, None

    monkeypatch.setitem(OBJECTIVES.records, "strange", Objective(strange))
    with pytest.raises(ValueError, match=r"called like the setting learner\.clip_high, and has another default"):
        validate(config(objective="strange"))


def test_what_an_objective_rules_out_follows_from_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from its name: a distillation samples, and needs no rewards."""
    record = Objective(lambda p, q, A: (p, None), "distil", advantage="none", needs_rewards=False)
    monkeypatch.setitem(OBJECTIVES.records, "distil", record)
    validate(replace(config(objective="distil"), rollout=RolloutConfig(group_size=4, curriculum="success_rate")))
    with pytest.raises(ValueError, match="shuffle_rewards has no meaning for the objective distil"):
        validate(replace(config(objective="distil"), shuffle_rewards=True))


def test_a_learner_refuses_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match="no objective is named 'ppo'"):
        Learner(tiny_policy("llama"), LearnerConfig(objective="ppo"))


def test_every_record_has_a_help_line_and_a_default_for_every_option() -> None:
    for registry in (OBJECTIVES, ADVANTAGES):
        for name in registry:
            assert registry[name].help.endswith("."), name
    with pytest.raises(ValueError, match="the option beta needs a default"):
        Record(lambda p, *, beta: p, "x")
    with pytest.raises(ValueError, match="there is an objective named 'grpo' already"):
        OBJECTIVES.add(Objective(lambda p, q, A: (p, None), "grpo"))


def test_an_advantage_that_compares_nothing_is_silent_where_all_rewards_are_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ADVANTAGES.records, "double", Advantage(lambda r: 2 * r, "double", compares=False))
    g = problems()[2]
    found = advantages(g, "double")
    assert found is not None
    assert found.tolist() == [0.2] * 3
    assert advantages(replace(g, episodes=tuple(replace(e, reward=0.0) for e in g.episodes)), "double") is None


def test_the_records_are_read_without_any_library() -> None:
    code = "import rl_lora.settings.validation, sys; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
