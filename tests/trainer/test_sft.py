"""Learning from demonstrations: the gradient of their likelihood, by the learner and the loop that rewards have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import yaml

from rl_lora.config import EnvConfig, LearnerConfig, RolloutConfig, TrainConfig
from rl_lora.learner.learner import Learner
from rl_lora.policy.chat import Chat
from rl_lora.policy.policy import Policy
from rl_lora.rollout.demonstrations import Demonstrations
from rl_lora.rollout.environments import environment
from rl_lora.scripts.command import parse
from rl_lora.scripts.configs import SftConfig
from rl_lora.settings.validation import validate
from rl_lora.trainer.trainer import train
from tests.oracles import Oracle, gradient, relative_error, tiny_policy
from tests.tiny import EOS_ID, tiny_folder, tiny_tokenizer
from tests.trainer.test_trainer import adapter_hash, assert_same_run, interrupt, metrics, tiny_config

GIVEN = LearnerConfig(objective="likelihood", max_grad_norm=0.0)


def sft_config(model: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    changes = {"learner__objective": "likelihood", "rollout__group_size": 1, "rollout__prompts_per_step": 8} | changes
    config = tiny_config(model, run_dir, **changes)
    del config.env.kwargs["reward"]
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def teacher(policy: Policy, **kwargs: Any) -> Demonstrations:
    return Demonstrations(environment(EnvConfig(kwargs=kwargs)), policy.chat, RolloutConfig())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_the_gradient_is_that_of_the_mean_log_likelihood(arch: str) -> None:
    policy = tiny_policy(arch)
    groups = teacher(policy).collect(range(5), adapters=["a"])
    n = sum(e.n_tokens for g in groups for e in g.episodes)
    oracle = Oracle(policy, arch)
    expected = oracle.gradients([(g, [1.0]) for g in groups], lambda logprobs, *_: logprobs, {"a": n})["a"]
    with torch.no_grad():
        loss = -sum(float(oracle.logprobs(e.turns[0], "a").sum()) for g in groups for e in g.episodes) / n
    (stats,) = Learner(policy, GIVEN).step(groups)
    assert relative_error(gradient(policy.bank["a"].flat), expected) < 1e-4
    assert stats.loss == pytest.approx(loss, rel=1e-4)
    assert (stats.n_groups_learned, stats.n_tokens_learned) == (5, n)
    assert stats.sampler_learner_kl is None
    assert stats.ratio_max is None


def test_a_demonstration_is_the_reply_that_the_model_would_have_written() -> None:
    policy = tiny_policy("llama")
    groups = teacher(policy, digits=1).collect([3, 4], adapters=["a", None])
    assert [(g.adapter, g.seed) for g in groups] == [("a", 3), ("a", 4), (None, 3), (None, 4)]
    env = gym.make("rl_lora/Arithmetic-v0", digits=1)
    for g in groups:
        (e,) = g.episodes
        (turn,) = e.turns
        _, info = env.reset(seed=g.seed)
        assert turn.completion_ids[-1] == EOS_ID
        assert policy.chat.decode(turn.completion_ids) == turn.text == str(info["reference"])
        info = env.step(turn.text)[-1]
        assert info["is_success"]


def test_a_reply_is_written_as_the_chat_template_writes_it() -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = [*chat.start("What?"), *chat.reply("This.")]
    assert f"{tokenizer.decode(ids)}\n" == whole
    assert ids[-1] == EOS_ID


def test_a_run_lowers_the_loss_and_reinforcement_goes_on_from_its_adapter(model: Path, tmp_path: Path) -> None:
    run_dir = train(sft_config(model, tmp_path / "sft", steps=8, learner__learning_rate=0.03))
    records = metrics(run_dir, "train")
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert all(r["reward"] is None and r["sampler_learner_kl"] is None for r in records)
    assert [r["step"] for r in metrics(run_dir, "eval")] == [0, 2, 4, 6, 8]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["learned"]
    assert (run_dir / "reward.png").exists()
    after = tmp_path / "rl"
    train(tiny_config(model, after, steps=1, adapter__init_from=str(run_dir / "adapter")))
    assert metrics(after, "eval")[0]["step"] == 0
    assert adapter_hash(after) != adapter_hash(run_dir)


def test_an_interrupted_run_goes_on_to_the_same_adapter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(sft_config(model, tmp_path / "whole"))
    config = sft_config(model, tmp_path / "parts")
    interrupt(monkeypatch, config, "checkpoint_if_due", 2)
    assert_same_run(train(replace(config, resume=True)), whole)


def test_the_command_has_settings_that_can_be_run(tmp_path: Path) -> None:
    config = parse(SftConfig, ["--run_dir", "runs/x", "--learner.learning_rate", "1e-3"])
    validate(config)
    assert (config.rollout.group_size, config.learner.objective) == (1, "likelihood")
    assert config.learner.learning_rate == 1e-3
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"rollout": {"prompts_per_step": 4}}))
    assert parse(SftConfig, ["--config", str(file)]).rollout.group_size == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout__group_size": 8}, "rollout.group_size must be 1 for demonstrations, got 8"),
        ({"learner__advantage": "mean"}, "learner.advantage must be none for demonstrations, got mean"),
        ({"shuffle_rewards": True}, "shuffle_rewards has no meaning"),
    ],
)
def test_what_has_no_meaning_for_demonstrations_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(sft_config(model, tmp_path / "run", **changes))


class Silent(gym.Env[str, str]):
    """A problem without a solution."""

    observation_space = action_space = gym.spaces.Text(10)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {}


def test_an_environment_that_shows_nothing_is_refused_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    gym.register("Silent-v0", "tests.trainer.test_sft:Silent")
    (model / "model.safetensors").rename(model / "away")
    try:
        config = sft_config(model, tmp_path / "run", eval__episodes=0)
        config.env = EnvConfig(id="Silent-v0")
        with pytest.raises(ValueError, match=r"shows no solution to learn from: .* info\['demonstration'\]"):
            train(config)
    finally:
        del gym.registry["Silent-v0"]
        (model / "away").rename(model / "model.safetensors")


def test_prompts_show_solutions_made_of_their_columns(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": f"p{i}", "equation": f"{i} + 1", "answer": float(i + 1)} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make: dict[str, Any] = {"path": str(file), "eval_fraction": 0}
    env = gym.make("rl_lora/Prompts-v0", **make, demonstration="{equation} = {answer}", disable_env_checker=True)
    seen = {}
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        seen[observation] = info["demonstration"]
    assert seen == {f"p{i}": f"{i} + 1 = {i + 1}" for i in range(4)}
    bare = gym.make("rl_lora/Prompts-v0", **make, disable_env_checker=True)
    assert "demonstration" not in bare.reset(seed=0)[1]
    for wrong, message in (("{equatio}", "did you mean {equation}"), ("7", "must contain a column")):
        with pytest.raises(ValueError, match=message):
            gym.make("rl_lora/Prompts-v0", **make, demonstration=wrong, disable_env_checker=True)
