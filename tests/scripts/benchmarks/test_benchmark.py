"""The benchmark, on a tiny model: every figure is there and can be; what cannot be measured is said at once."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from rl_lora.config import ModelConfig
from rl_lora.scripts.benchmarks.benchmark import BenchmarkConfig, run
from rl_lora.scripts.benchmarks.breakdown import ADAPTER, ATTENTION, BASE, HEAD, OTHER, REST, breakdown
from rl_lora.scripts.benchmarks.measurements import Bench, Shape, shape
from tests.tiny import tiny_folder


def test_every_figure_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BenchmarkConfig(
        model=ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"),
        rollouts=["3x2x4", "2x1x3"],
        steps=["2x3x5"],
        rounds=2,
        breakdown=True,
        out=str(tmp_path / "figures.json"),
    )
    run(config)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["config"]["rounds"] == 2
    assert figures["machine"]["dtype"] == "torch.float32"
    rollouts, alone = figures["rollouts"]
    assert set(alone["rounds"]) == {"rollout", "peak"}, "a single completion has nothing to learn from"
    assert set(alone["breakdown"]) == {"rollout"}
    assert rollouts["shape"] == "3x2x4"
    for side, tokens in (("rollout", 3 * 2 * 4), ("learn", None)):
        assert len(rollouts["rounds"][side]) == 2
        for of_round in rollouts["rounds"][side]:
            assert tokens in (None, of_round["tokens"])
            assert of_round["peak_bytes"] > 2**20
            assert of_round["tokens_per_second"] == pytest.approx(of_round["tokens"] / of_round["seconds"])
            assert 0 < of_round["share_of_peak"] < 1
    assert all(0 < of_round["share_of_bandwidth"] < 1 for of_round in rollouts["rounds"]["rollout"])
    assert {part["kind"] for part in rollouts["breakdown"]["learning"]} == {BASE, HEAD, ADAPTER, ATTENTION, OTHER, REST}
    (steps,) = figures["steps"]
    for of_round in steps["rounds"]["rl_lora"]:
        assert of_round["seconds"] == pytest.approx(of_round["rollout_seconds"] + of_round["learn_seconds"])
        assert 2 * 3 <= of_round["tokens"] <= 2 * 3 * 5
        assert 0 <= of_round["reward"] <= 1
    printed = capsys.readouterr().out
    for text in ("rl_lora, rollout", "rl_lora, learning", "GFLOP/s", "GB/s", BASE, "a training step", "figures.json"):
        assert text in printed


def test_the_products_that_are_counted_are_those_that_are_computed(tmp_path: Path) -> None:
    """One prompt, one completion: prompt and all tokens but the last through the layers, targets through the head."""
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"))
    weights = {n: p.numel() for n, p in bench.policy.model.named_parameters() if n.endswith("_proj.weight")}
    assert bench.n_linear == sum(weights.values())
    bench.fresh()
    (prompt,) = bench.prompts(1)
    groups, _ = bench.sample([prompt], Shape(1, 2, 4), 0)
    learned = bench.learn(groups)
    assert learned["targets"] == 8
    assert learned["tokens"] == len(prompt) + 2 * 3
    assert math.isfinite(learned["flops"])


def test_the_bytes_that_are_counted_are_those_that_have_to_be_read(tmp_path: Path) -> None:
    """One prompt, two completions of three tokens, by hand."""
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"))
    (prompt,) = bench.prompts(1)
    weights = 4 * (bench.n_linear + bench.n_head)
    of_token = bench.policy.cache_bytes_per_token
    assert of_token == 2 * 2 * 2 * 16 * 4, "keys and values of two layers, two heads of 16, in float32"
    by_hand = 3 * weights + of_token * sum(len(prompt) + 2 * t for t in range(3))
    assert bench.rollout_costs([prompt], Shape(1, 2, 3))["bytes"] == by_hand


@pytest.mark.parametrize("rank", [1, 3])
def test_a_breakdown_knows_products_by_their_weights(tmp_path: Path, rank: int) -> None:
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"), rank=rank)
    bench.fresh()
    prompts = bench.prompts(2)
    parts = {p.kind: p for p in breakdown(bench.policy, lambda: bench.sample(prompts, Shape(2, 2, 5), 0))}
    # Two layers of seven matrices; prompts are read in two passes at most, and five tokens drawn by four steps.
    passes = parts[BASE].n / 14
    assert passes in (4 + 1, 4 + 2)
    assert parts[ADAPTER].n == 2 * parts[BASE].n, "A and B of every matrix"
    assert parts[HEAD].n == 5
    assert parts[ATTENTION].n > 0
    assert all(part.seconds > 0 for part in parts.values())


@pytest.mark.parametrize("text", ["3x2", "3x2xx", "0x1x1", "axbxc", "1x2x3x4", ""])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a shape is prompts x completions x tokens"):
        shape(text)
    assert str(shape("16x8x4")) == "16x8x4"


def test_peers_that_are_not_there_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no peer 'trll'; there are transformers"):
        run(BenchmarkConfig(peer=["trll"]))
    missing = str(tmp_path / "python")
    with pytest.raises(ValueError, match="make peers"):
        run(BenchmarkConfig(peer=["trl"], peer_python=missing))
    with pytest.raises(ValueError, match="peers read a model's folder"):
        run(BenchmarkConfig(peer=["trl"], peer_python=sys.executable, random="llama-8b"))
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        run(BenchmarkConfig(rounds=0))
