"""Tiny runs from end to end, in process: what a run writes, that it can be repeated, and killed, and gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import (
    AdapterConfig,
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    LearnerConfig,
    LogConfig,
    ModelConfig,
    RolloutConfig,
    TrainConfig,
)
from rl_lora.learner.learner import SamplerLearnerMismatch
from rl_lora.lora.peft_io import load_adapter
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.policy.policy import Policy
from rl_lora.rollout.held_out import evaluate_adapters, held_out
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion
from rl_lora.sampler.rows import SamplingState
from rl_lora.system import files
from rl_lora.trainer import trainer as trainer_module
from rl_lora.trainer.checkpoint import Checkpoints
from rl_lora.trainer.problem_order import fresh_seeds, problem_seeds
from rl_lora.trainer.trainer import ADAPTER, Trainer, train
from rl_lora.types import Group
from tests.tiny import tiny_folder, token_ids

ALWAYS = """
    kind step reward accuracy truncated unscorable tokens_per_episode turns_per_episode parts/short
""".split()  # noqa: SIM905
TRAIN = """
    reward_std groups_without_signal groups_solved completion_tokens tokens_per_episode_max version learning_rate
    groups_replaced layers_recomputed tokens_learned sampler_learner_kl ratio_max loss entropy clip_fraction grad_norm
    step_norm A_norm B_norm
    seconds/rollout seconds/reward seconds/learn rollout_tokens_per_second learn_tokens_per_second
""".split()  # noqa: SIM905
EVAL = ["episodes", "accuracy_low", "accuracy_high", "format", "same_reply", "seconds/evaluate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def tiny_config(model: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """Four steps of the tiny model in float32; `changes` are fields of the run, or "room.field" of its rooms."""
    config = TrainConfig(
        run_dir=str(run_dir),
        steps=4,
        model=ModelConfig(name=str(model), dtype="float32"),
        adapter=AdapterConfig(rank=2),
        env=EnvConfig(kwargs={"digits": 1, "reward": "tests.tiny_reward:ascii_share", "template": "{a}+{b}"}),
        rollout=RolloutConfig(prompts_per_step=4, group_size=3, max_tokens=6),
        learner=LearnerConfig(learning_rate=0.01),
        eval=EvalConfig(every=2, episodes=6),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(trackers=[], samples_every=0),
    )
    for name, value in changes.items():
        room, _, field = name.rpartition("__")
        setattr(getattr(config, room) if room else config, field, value)
    return config


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps without any interruption."""
    return train(tiny_config(model, tmp_path_factory.mktemp("whole") / "run", log__trackers=["tensorboard"]))


def metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if kind in (None, record["kind"])]


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("seconds/", "rollout_tokens_per", "learn_tokens_per")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in metrics(run_dir)]


def adapter_hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def evals(run_dir: Path, folder: str = "evals") -> dict[str, str]:
    return {path.name: path.read_text() for path in (run_dir / folder).iterdir()}


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert without_times(run_dir) == without_times(other)
    assert adapter_hash(run_dir) == adapter_hash(other)
    assert evals(run_dir) == evals(other)
    assert evals(run_dir, "samples") == evals(other, "samples")


def interrupt(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, method: str, step: int) -> None:
    """Run `config` until `Trainer.method` has been done in `step`: there it is killed."""
    done = getattr(Trainer, method)

    def done_then_killed(self: Trainer, *args: Any) -> Any:
        result = done(self, *args)
        if self.step == step:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, done_then_killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_a_run_leaves_its_config_metrics_checkpoints_adapter_evaluations_curve_and_summary(whole: Path) -> None:
    there = {path.name for path in whole.iterdir()}
    assert there == {
        *(
            "config.yaml",
            "metrics.jsonl",
            "checkpoints",
            "adapter",
            "evals",
            "samples",
            "reward.png",
            "report.html",
            "summary.json",
        ),
        "trackers",
        ".lock",
    }
    assert (whole / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list(whole.glob("trackers/**/events.out.tfevents.*"))
    assert [checkpoint.step for checkpoint in Checkpoints(whole / "checkpoints", 2).all()] == [2, 4]
    assert sorted(evals(whole)) == [f"step-{step:06d}.jsonl" for step in (0, 2, 4)]
    assert all(len(text.splitlines()) == 6 for text in evals(whole).values())
    assert sorted(evals(whole, "samples")) == [f"step-{step:06d}.jsonl" for step in (1, 2, 3, 4)]
    assert all(len(text.splitlines()) == 4 * 3 for text in evals(whole, "samples").values())
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert (config["adapter"]["rank"], config["learner"]["betas"], config["steps"]) == (2, [0.9, 0.95], 4)
    assert not list(whole.rglob("*partial*"))


def test_every_step_has_one_complete_record(whole: Path) -> None:
    train_records, eval_records = metrics(whole, "train"), metrics(whole, "eval")
    assert [record["step"] for record in train_records] == [1, 2, 3, 4]
    assert [record["step"] for record in eval_records] == [0, 2, 4]
    assert all(sorted(record) == sorted(ALWAYS + TRAIN) for record in train_records)
    assert all(sorted(record) == sorted(ALWAYS + EVAL) for record in eval_records)
    for record in train_records:
        assert all(isinstance(record[name], int | float) for name in set(TRAIN) | {"reward", "accuracy", "truncated"})
        assert record["sampler_learner_kl"] < 1e-4  # float32: sampler and learner are one policy
        assert 0 < record["entropy"] < 6
        assert record["version"] == record["step"]
        assert record["learning_rate"] == 0.01


def test_the_summary_says_what_was_before_and_after_and_what_to_do_next(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    first, *_, last = metrics(whole, "eval")
    assert (summary["steps"], summary["before"], summary["after"]) == (4, first, last)
    assert [summary["reward_first"], summary["reward_last"]] == [metrics(whole, "train")[i]["reward"] for i in (0, -1)]
    assert Path(summary["adapter"]) == whole / "adapter"
    assert Path(summary["best_checkpoint"]).is_dir()
    before, after = (
        {sample["seed"]: sample for sample in map(json.loads, evals(whole)[f"step-{step:06d}.jsonl"].splitlines())}
        for step in (0, 4)
    )
    solved = [seed for seed in after if after[seed]["success"] and not before[seed]["success"]]
    assert len(summary["transcripts"]) == min(3, len(solved))
    assert "python scripts/evaluate.py --" in summary["next"]
    assert f" --adapters {whole / 'adapter'}" in summary["next"]


def test_the_adapter_loads_in_peft_and_gives_the_policys_logits(whole: Path, model: Path) -> None:
    policy = Policy.load(str(model), dtype="float32")
    load_adapter(whole / "adapter", policy.bank, "trained")
    ids = token_ids(2, 12)
    hidden = policy.hidden(ids, ["trained"] * 2)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    untrained = base(ids).logits
    logits = PeftModel.from_pretrained(base, whole / "adapter")(ids).logits
    torch.testing.assert_close(policy.head.logits(hidden.flatten(0, 1)), logits.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, untrained, atol=1e-2)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole: Path, model: Path, tmp_path: Path) -> None:
    assert_same_run(train(tiny_config(model, tmp_path / "same")), whole)
    other = train(tiny_config(model, tmp_path / "other", seed=1))
    assert adapter_hash(other) != adapter_hash(whole)
    assert {record["seed"] for record in problems(other)} == {record["seed"] for record in problems(whole)}


def problems(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in evals(run_dir)["step-000000.jsonl"].splitlines()]


@pytest.mark.parametrize(
    ("method", "step"),
    [("log", 3), ("evaluate_if_due", 2), ("checkpoint_if_due", 2), ("evaluate_if_due", 4), ("checkpoint_if_due", 4)],
)
def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(
    method: str, step: int, whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, tiny_config(model, tmp_path), method, step)
    assert_same_run(train(tiny_config(model, tmp_path, resume=True)), whole)


@pytest.mark.parametrize(("method", "step"), [("_open", 0), ("evaluate_if_due", 0), ("log", 1)])
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    method: str, step: int, whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resume in (True, False):  # there is nothing that could be lost
        run_dir = tmp_path / str(resume)
        interrupt(monkeypatch, tiny_config(model, run_dir), method, step)
        assert_same_run(train(tiny_config(model, run_dir, resume=resume)), whole)
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train(tiny_config(model, run_dir))


def test_a_checkpoint_cut_off_while_it_was_written_is_none(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "checkpoints", files.write_bytes

    def killed(path: Path, data: Any) -> None:
        if path.name == "random.pt" and (folder / "step-000002").exists():
            shutil.copytree(
                path.parent, folder / ".partial-step-000004-left", dirs_exist_ok=True
            )  # as SIGKILL would leave it
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(model, tmp_path))
    assert [checkpoint.step for checkpoint in Checkpoints(folder, 2).all()] == [2]
    assert_same_run(train(tiny_config(model, tmp_path, resume=True)), whole)
    assert not list(folder.glob(".*"))


def test_a_finished_run_can_be_made_longer(whole: Path, model: Path, tmp_path: Path) -> None:
    train(tiny_config(model, tmp_path, steps=2))
    assert_same_run(train(tiny_config(model, tmp_path, resume=True)), whole)
    with pytest.raises(ValueError, match=r"has come to step 4, behind steps=3; set --steps to 4 or more"):
        train(tiny_config(model, tmp_path, steps=3, resume=True))


def test_resuming_a_finished_run_shows_its_summary_and_loads_no_model(
    model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr(Policy, "load", None)
    train(tiny_config(model, whole, resume=True, log__trackers=["tensorboard"]))
    shown = capsys.readouterr().out
    assert "4 steps in" in shown
    assert "before  accuracy" in shown
    assert str(whole / "reward.png") in shown
    assert str(whole / "report.html") in shown
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_resumed_run_must_have_the_same_configuration_but_for_what_moves_nothing(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    train(tiny_config(model, tmp_path, steps=2))
    changed = tiny_config(model, tmp_path, resume=True, learner__learning_rate=0.5, rollout__group_size=4)
    changed.env.kwargs = {**changed.env.kwargs, "digits": 2}
    with pytest.raises(ValueError, match="holds a run of another configuration") as error:
        train(changed)
    for name in ("learner.learning_rate: 0.01 -> 0.5", "rollout.group_size: 3 -> 4", "env.kwargs: {'digits': 1"):
        assert name in str(error.value)
    assert "steps" not in str(error.value)
    fine = tiny_config(model, tmp_path, resume=True, log__samples_every=1, checkpoint__keep=5, rollout__max_rows=7)
    assert adapter_hash(train(fine)) == adapter_hash(whole)


def test_the_newest_checkpoints_and_the_best_are_kept(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path, steps=6, checkpoint__every=1, eval__every=1)
    train(config)
    scores = {record["step"]: record["accuracy"] for record in metrics(tmp_path, "eval") if record["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert [checkpoint.step for checkpoint in checkpoints.all()] == sorted({5, 6, best})
    found = checkpoints.best()
    assert found is not None
    assert (found.step, found.state["score"]) == (best, scores[best])


def trainable_adapter(model: Path) -> TrainableAdapter:
    bank = Policy.load(str(model), dtype="float32").bank
    bank.add("a")
    return TrainableAdapter(bank, "a", "tiny")


def test_the_best_checkpoint_outlives_newer_worse_ones(model: Path, tmp_path: Path) -> None:
    trainable = trainable_adapter(model)
    optimizer = torch.optim.AdamW(trainable.weights)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.5, None, 0.5, 0.2, 0.3], 1):
        checkpoints.save(step, trainable, optimizer, config={}, score=score)
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (2, 6)
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [2, 5, 6]


def test_a_checkpoint_brings_the_random_states_back_for_what_users_bring_along(model: Path, tmp_path: Path) -> None:
    trainable = trainable_adapter(model)
    optimizer = torch.optim.AdamW(trainable.weights)
    saved = Checkpoints(tmp_path, 1).save(1, trainable, optimizer, config={}, score=None)

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.rand(()))

    following = draw()
    assert draw() != following
    saved.restore(trainable, lambda _: optimizer)
    assert draw() == following


def test_a_config_is_the_same_after_it_was_written_and_must_be_what_can_be_written(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path, steps=1)
    config.env.kwargs["operations"] = ("+", "-")  # a tuple is a list on disk
    config.env.kwargs["template"] = "{a}{op}{b}"
    train(config)
    train(dataclasses.replace(config, steps=2, resume=True))
    config.env.kwargs["reward"] = len
    with pytest.raises(ValueError, match=r"env.kwargs must be numbers, texts, .* a function is named as 'module:func"):
        train(dataclasses.replace(config, run_dir=str(tmp_path / "other")))


def test_metrics_are_those_of_all_episodes_before_any_group_is_filtered(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(model, tmp_path, rollout__group_size=2, rollout__prompts_per_step=8))
    groups, _ = trainer.collector.collect(0)
    trainer.run()
    rewards = [[episode.reward for episode in group.episodes] for group in groups]
    silent = sum(len(set(rewards_G)) == 1 for rewards_G in rewards)
    assert 0 < silent < 8
    record = metrics(tmp_path, "train")[0]
    assert record["groups_without_signal"] == silent / 8
    assert record["reward"] == pytest.approx(sum(map(sum, rewards)) / 16)
    assert record["completion_tokens"] == sum(episode.n_tokens for group in groups for episode in group.episodes)
    assert record["tokens_learned"] == sum(
        episode.n_tokens
        for group in groups
        for episode in group.episodes
        if len({e.reward for e in group.episodes}) > 1
    )


def test_the_base_is_the_same_before_and_after(model: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(model, tmp_path))
    trainer.run()
    assert trainer.policy.bank[ADAPTER].version == 4
    assert trainer.policy.bank.base_hash() == Policy.load(str(model), dtype="float32").bank.base_hash()


def test_the_evaluation_before_training_is_the_bases(whole: Path, model: Path) -> None:
    config = tiny_config(model, whole)
    policy = Policy.load(str(model), dtype="float32")
    make_env, seeds = held_out(config.env, None, config.eval.episodes)
    worker = RolloutWorker(make_env, NativeSampler(policy), policy.chat, config.rollout)
    (evaluation,) = evaluate_adapters(worker, seeds, [None])
    record = metrics(whole, "eval")[0]
    assert {name: record[name] for name in evaluation.record} == evaluation.record
    assert [sample["completions"] for sample in problems(whole)] == [s["completions"] for s in evaluation.samples()]


def test_a_run_learns_and_its_control_with_shuffled_rewards_does_not(model: Path, tmp_path: Path) -> None:
    size = {"rollout__prompts_per_step": 16, "rollout__group_size": 8, "eval__episodes": 0, "checkpoint__every": 20}
    gain = {}
    for control in (False, True):
        run_dir = tmp_path / str(control)
        train(tiny_config(model, run_dir, steps=20, shuffle_rewards=control, learner__learning_rate=0.05, **size))
        rewards = [record["reward"] for record in metrics(run_dir, "train")]
        gain[control] = sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5
    assert gain[False] > 0.2
    assert abs(gain[True]) < 0.1


def test_groups_that_teach_nothing_are_replaced_by_other_problems(model: Path, tmp_path: Path) -> None:
    few = {"rollout__group_size": 2, "rollout__prompts_per_step": 6}

    def silent(groups: list[Group]) -> int:
        return sum(len({episode.reward for episode in group.episodes}) == 1 for group in groups)

    plain, none_replaced = Trainer(tiny_config(model, tmp_path / "plain", **few)).collector.collect(0)
    assert plain == none_replaced
    n = silent(plain)
    assert n >= 2
    groups, sampled = Trainer(
        tiny_config(model, tmp_path / "budget", **few, rollout__max_replaced=n - 1)
    ).collector.collect(0)
    assert sampled[:6] == plain
    assert len(groups) == 6
    assert len(sampled) == 6 + n - 1, "the budget is spent as long as a group is silent"
    assert {group.seed for group in groups} <= {group.seed for group in sampled}
    assert len({group.seed for group in sampled}) == len(sampled)
    assert [group for group in groups if group in plain] == [g for g in plain if g in groups], "others keep their place"

    config = tiny_config(model, tmp_path / "run", **few, rollout__max_replaced=20)
    groups, sampled = Trainer(config).collector.collect(0)
    assert silent(groups) < n
    assert silent(groups) == 0 or len(sampled) == 26
    records = metrics(train(config), "train")
    assert all(record["groups_replaced"] >= 1 for record in records)
    assert all(record["groups_replaced"] <= 20 for record in records)
    seeds = [{*problem_seeds(config, step), *fresh_seeds(config, step)} for step in range(4)]
    assert len(set.union(*seeds)) == sum(map(len, seeds)) == 4 * 26


def test_shuffled_rewards_are_the_steps_own(model: Path, tmp_path: Path) -> None:
    plain, shuffled = (
        Trainer(tiny_config(model, tmp_path, shuffle_rewards=shuffle)).collector.collect(0)[0]
        for shuffle in (False, True)
    )
    rewards, dealt = ([e.reward for group in groups for e in group.episodes] for groups in (plain, shuffled))
    assert sorted(rewards) == sorted(dealt)
    assert rewards != dealt
    assert [e.turns for group in plain for e in group.episodes] == [e.turns for g in shuffled for e in g.episodes]


def test_training_starts_from_a_given_adapter(whole: Path, model: Path, tmp_path: Path) -> None:
    run_dir = train(tiny_config(model, tmp_path, adapter__init_from=str(whole / "adapter"), adapter__rank=8))
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2  # the given one's
    assert evals(run_dir)["step-000000.jsonl"] == evals(whole)["step-000004.jsonl"]
    assert adapter_hash(run_dir) != adapter_hash(whole)


def test_dropout_of_a_given_adapter_is_not_dropped_in_silence(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = shutil.copytree(whole / "adapter", tmp_path / "given")
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.05, "use_rslora": True}))
    run_dir = train(tiny_config(model, tmp_path / "run", adapter__init_from=str(given), steps=1))
    assert "was trained with lora_dropout 0.05: here nothing is dropped, and the adapter that is saved says 0" in (
        " ".join(capsys.readouterr().out.split())
    )
    saved = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert (saved["lora_dropout"], saved["use_rslora"], saved["lora_alpha"]) == (0, True, config["lora_alpha"])
    train(tiny_config(model, tmp_path / "plain", adapter__init_from=str(whole / "adapter"), steps=1))
    assert "lora_dropout" not in capsys.readouterr().out


def test_grpo_trains_and_takes_its_papers_advantage(model: Path, tmp_path: Path) -> None:
    grpo = train(tiny_config(model, tmp_path / "grpo", learner__objective="grpo", learner__updates_per_step=2))
    named = {"learner__objective": "grpo", "learner__updates_per_step": 2, "learner__advantage": "standardized"}
    assert adapter_hash(train(tiny_config(model, tmp_path / "named", **named))) == adapter_hash(grpo)
    named["learner__advantage"] = "mean"
    assert adapter_hash(train(tiny_config(model, tmp_path / "mean", **named))) != adapter_hash(grpo)


def test_two_updates_a_step_raise_the_version_by_two(model: Path, tmp_path: Path) -> None:
    size = {"rollout__prompts_per_step": 8, "learner__learning_rate": 0.05}
    train(tiny_config(model, tmp_path, learner__updates_per_step=2, steps=3, **size))
    records = metrics(tmp_path, "train")
    assert [record["version"] for record in records] == [2, 4, 6]
    assert all(record["sampler_learner_kl"] < 1e-4 for record in records)  # of the first update, before anything moved
    assert max(record["ratio_max"] for record in records) > 1.01  # the second update is off-policy


def test_a_run_without_evaluation_has_no_before_and_after(model: Path, tmp_path: Path) -> None:
    train(tiny_config(model, tmp_path, steps=1, eval__episodes=0))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["before"], summary["after"], summary["transcripts"]) == (None, None, [])
    assert summary["best_checkpoint"] is None
    assert (tmp_path / "reward.png").exists()


def test_the_sampler_that_the_factory_makes_samples_and_is_told_of_every_change_of_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str | None, int]] = []

    class Told(NativeSampler):
        sampled = 0

        def generate(self, *args: Any) -> list[list[Completion]]:
            type(self).sampled += 1
            return super().generate(*args)

        def weights_changed(self, adapter: str | None, version: int) -> None:
            super().weights_changed(adapter, version)
            told.append((adapter, version))

    monkeypatch.setattr(trainer_module, "make_sampler", lambda policy, config, compile: Told(policy, config.max_rows))
    Trainer(tiny_config(model, tmp_path, steps=2, learner__updates_per_step=2)).run()
    assert told == [(ADAPTER, 2), (ADAPTER, 4)]
    assert Told.sampled >= 4, "two steps and two evaluations"


def test_a_run_whose_sampler_and_learner_disagree_stops_before_it_learns_from_noise(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = SamplingState.completion

    def wrong(self: SamplingState, *args: Any) -> Completion:
        reply = completion(self, *args)
        return dataclasses.replace(reply, logprobs=tuple(p - 1.0 for p in reply.logprobs))

    monkeypatch.setattr(SamplingState, "completion", wrong)
    trainer = Trainer(tiny_config(model, tmp_path))
    fresh = trainer.policy.bank[ADAPTER].flat.detach().clone()
    with pytest.raises(SamplerLearnerMismatch, match="sampler and learner disagree"):
        trainer.run()
    assert torch.equal(trainer.policy.bank[ADAPTER].flat, fresh)


def test_replies_that_look_like_markup_are_shown_as_they_are(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(model, tmp_path / "[run]", steps=1, log__samples_every=1)
    config.env.kwargs["template"] = "[/b] {a} + {b} [red]"
    train(config)
    shown = capsys.readouterr().out
    assert "[/b]" in shown
    assert "[red]" in shown
    assert str(tmp_path / "[run]" / "adapter") in shown


def test_training_problems_never_repeat_before_the_environment_does(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path)
    seeds = [seed for step in range(10) for seed in problem_seeds(config, step)]
    assert seeds == list(range(40))
    config.seed = 1
    assert not set(seeds) & set(problem_seeds(config, 0))


def test_the_best_step_is_kept_whatever_the_checkpoints_interval(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path / "run", eval__every=1, checkpoint__every=4, checkpoint__keep=1)
    run_dir = train(config)
    scores = {record["step"]: record["accuracy"] or record["reward"] for record in metrics(run_dir, "eval")}
    best = Checkpoints(run_dir / "checkpoints", 1).best()
    assert best is not None
    assert best.state["score"] == max(score for step, score in scores.items() if step > 0)


def test_a_reward_that_draws_at_random_draws_the_same_in_the_same_run(model: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        random.seed(name)  # wherever the process was before
        config = tiny_config(model, tmp_path / name)
        config.env.kwargs["reward"] = "tests.tiny_reward:noise"
        runs.append(train(config))
    assert_same_run(*runs)


def test_a_prompt_that_does_not_fit_is_found_before_the_model_is_loaded_whichever_step_it_comes_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i} " * (400 if i == 11 else 1), "answer": "1"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Policy, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    env = EnvConfig("rl_lora/Prompts-v0", {"path": str(path), "eval_path": str(path)})
    config = tiny_config(model, tmp_path / "run", env=env, eval__episodes=0)
    with pytest.raises(ValueError, match=r"prompt of rl_lora/Prompts-v0.* tokens"):
        train(config)
