"""Two processes under `accelerate launch` are one run: one set of files, the gradient and the adapter of one process.

Equal up to the order of float32 sums: each process adds up its own groups first.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl_lora.config import EnvConfig
from rl_lora.policy.policy import Policy
from rl_lora.rollout.environments import environment
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.trainer.checkpoint import Checkpoints
from rl_lora.trainer.trainer import train
from tests import ROOT
from tests.gradient_of_processes import gradient
from tests.tiny import randomize, tiny_folder
from tests.trainer.test_trainer import metrics, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def launch(script: str, *args: str, options: str = "--multi_gpu --num_processes 2") -> subprocess.CompletedProcess[str]:
    """`script` on two processes of the CPU.

    `--cpu --num_processes 2` starts a single one without a word where there is no MPI (accelerate 1.15); the launcher
    behind `--multi_gpu` starts as many as it is told, and the environment variable puts them on the CPU.
    """
    common = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*accelerate, *options.split(), *common.split(), script, *args]
    environ = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "updates, curriculum",
    [
        (1, "none"),
        pytest.param(2, "none", marks=pytest.mark.slow),
        pytest.param(1, "success_rate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_adapter_of_one_and_write_one_set_of_files(
    updates: int, curriculum: str, model: Path, tmp_path: Path
) -> None:
    config = tiny_config(model, tmp_path / "one", steps=2, rollout__prompts_per_step=5, eval__every=1)
    if curriculum != "none":
        rows = [{"prompt": f"{i}?", "answer": i} for i in range(6)]  # the second step meets four of the first again
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs = {"path": str(tmp_path / "p.jsonl"), "eval_path": str(tmp_path / "p.jsonl")}
        config.env = EnvConfig("rl_lora/Prompts-v0", {**kwargs, "reward": "tests.tiny_reward:ascii_share"})
        config.rollout.curriculum = curriculum  # type: ignore[assignment]
    config.learner.updates_per_step = updates
    config.checkpoint.every = 1
    train(config)
    recorded = str(tmp_path / "one" / "config.yaml")
    result = launch("-m", "rl_lora", "train", "--config", recorded, "--run_dir", str(tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout
    one, two = (metrics(tmp_path / run) for run in ("one", "two"))
    assert [(record["kind"], record["step"]) for record in two] == [(record["kind"], record["step"]) for record in one]
    for record, other in zip(one, two, strict=True):
        assert record.keys() == other.keys()
        for name in record:
            if record[name] is None:  # of the first step, nothing is expected
                assert other[name] is None, name
            elif name not in ("kind", "sampler_learner_kl") and "second" not in name:  # the kl is rounding itself
                assert other[name] == pytest.approx(record[name], rel=1e-4, abs=1e-5), name
    weights, others = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert weights.keys() == others.keys()
    for name in weights:
        # AdamW steps by 0.01 however small a gradient is: rounding decides where it is almost nothing.
        torch.testing.assert_close(others[name], weights[name], atol=1e-4, rtol=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    assert [checkpoint.step for checkpoint in Checkpoints(tmp_path / "two" / "checkpoints", 2).all()] == [1, 2]
    for evaluation in (tmp_path / "one" / "evals").iterdir():
        assert (tmp_path / "two" / "evals" / evaluation.name).read_text() == evaluation.read_text()
    assert result.stdout.count("step   1  reward") == 1  # only the first process speaks
    assert result.stdout.count("2 steps in") == 1


def test_the_gradient_of_two_processes_is_that_of_one_on_the_same_groups(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path)
    policy = Policy.load(str(model), dtype="float32")
    randomize(policy.bank.add("a", rank=2), 0)
    worker = RolloutWorker(environment(config.env), NativeSampler(policy), policy.chat, config.rollout)
    groups = worker.collect(range(9), adapters=["a"], n=2)
    silent = [len({episode.reward for episode in group.episodes}) == 1 for group in groups]
    assert 0 < sum(silent) < 9
    expected = gradient(str(model), groups, None)
    assert expected.abs().max() > 1e-3
    (tmp_path / "groups").write_bytes(pickle.dumps(groups))
    result = launch("tests/gradient_of_processes.py", str(model), str(tmp_path / "groups"), str(tmp_path / "gradient"))
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "gradient", weights_only=True)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_the_cpu_launcher_trains_and_says_how_many_processes_it_started(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tmp_path / "one", steps=2)
    train(config)
    recorded = str(tmp_path / "one" / "config.yaml")
    script = ["scripts/train.py", "--config", recorded, "--run_dir", str(tmp_path / "two")]
    result = launch(*script, options="--cpu --num_processes 2")
    assert result.returncode == 0, result.stderr
    assert "process" in result.stdout
    assert [record["step"] for record in metrics(tmp_path / "two", "train")] == [1, 2]
