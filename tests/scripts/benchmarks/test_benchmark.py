"""The benchmark, on a tiny model: every figure is there and can be; what cannot be measured is said at once."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from rl_lora.attention.prefixes import find_shared_prefixes
from rl_lora.config import ModelConfig
from rl_lora.kernels import adapted_linear
from rl_lora.scripts.benchmarks.benchmark import BenchmarkConfig, run
from rl_lora.scripts.benchmarks.breakdown import (
    ADAPTER,
    ATTENTION,
    BASE,
    ELEMENTWISE,
    HEAD,
    KINDS,
    REST,
    VOCABULARY,
    WeightShapes,
    breakdown,
    kind_of,
    naming_fused_kernels,
)
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
    assert {part["kind"] for part in rollouts["breakdown"]["learning"]} == set(KINDS)
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
    # A and B of every matrix, where the base's products do not add them on the way.
    assert parts[ADAPTER].n == (0 if adapted_linear.serves("cpu", torch.float32) else 2 * parts[BASE].n)
    assert parts[HEAD].n == 5
    assert all(part.n > 0 and part.seconds > 0 for kind, part in parts.items() if kind not in (REST, ADAPTER))


@pytest.mark.parametrize(
    ("kind", "names", "shapes"),
    [
        (BASE, ["rl_lora::frozen_linear"], [[8, 48], [64, 48], [64, 48], []]),
        (HEAD, ["rl_lora::frozen_linear"], [[8, 48], [258, 48], [258, 48], []]),
        (BASE, ["mkldnn::_linear_pointwise", "rl_lora::frozen_linear"], [[8, 48], [64, 48]]),
        (BASE, ["aten::mm"], [[8, 64], [64, 48]]),
        (HEAD, ["aten::mm", "_TokenLogprobs"], [[8, 258], [258, 48]]),
        (ADAPTER, ["aten::mm", "## Call CompiledFxGraph f1 ##"], [[8, 48], [48, 1]]),
        (ADAPTER, ["aten::addcmul_"], [[8, 64], [8, 1], [1, 64]]),
        (ELEMENTWISE, ["aten::addcmul_"], [[8, 64], [8, 64], [8, 64]]),
        (ATTENTION, ["rl_lora::decode_attention"], []),
        (ATTENTION, ["aten::copy_", "aten::contiguous", "_PaddedAttentionBackward"], [[8, 48]]),
        (ATTENTION, ["graph_0_cpp_fused__softmax__to_copy_add_4", "## Call CompiledFxGraph f1 ##"], []),
        (VOCABULARY, ["aten::_softmax", "rl_lora::sampling"], [[8, 258]]),
        (VOCABULARY, ["aten::copy_", "_TokenLogprobs"], [[8, 258]]),
        (ELEMENTWISE, ["graph_0_cpp_fused_addcmul_mul_silu_t_view_7", "## Call CompiledFxGraph f1 ##"], []),
        (ELEMENTWISE, ["rl_lora::rms_norm"], [[8, 48]]),
        (ELEMENTWISE, ["aten::copy_"], [[8, 48]]),
        (REST, ["## Call CompiledFxGraph f1 ##"], []),
        (ADAPTER, ["_AdaptedLinearBackward"], []),
        (VOCABULARY, ["rl_lora::token_logprobs"], []),
        (REST, ["_RMSNorm"], [[8, 48]]),
        (REST, ["AOTDispatcher Runtime Wrapper Prologue"], []),
        (REST, ["aten::_unsafe_view"], [[8, 48]]),
        (REST, ["autograd::engine::evaluate_function: MmBackward0"], []),
    ],
)
def test_the_kind_of_an_operation(tmp_path: Path, kind: str, names: list[str], shapes: list[list[int]]) -> None:
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="bfloat16"))
    bench.fresh()
    assert kind_of(WeightShapes.of(bench.policy), names, shapes) == kind


def test_the_python_around_a_product_is_no_product(tmp_path: Path) -> None:
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama"))))
    weights, name = WeightShapes.of(bench.policy), "rl_lora::frozen_linear"
    assert kind_of(weights, [name], [[8, 48], [64, 48]], has_product_inside=True) == REST


@pytest.mark.slow
def test_fused_kernels_of_compiled_layers_are_counted_apart_from_their_python(tmp_path: Path) -> None:
    with naming_fused_kernels():
        bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="bfloat16", compile=True))
        bench.fresh()
        prompts = bench.prompts(2)
        bench.sample(prompts, Shape(2, 2, 5), 0)
        parts = {p.kind: p for p in breakdown(bench.policy, lambda: bench.sample(prompts, Shape(2, 2, 5), 0))}
    assert parts[ELEMENTWISE].n >= 2 * 3 * 4, "two layers, three kernels at least, four steps"


def test_numbers_of_adapters_are_measured_in_turns_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BenchmarkConfig(
        model=ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"),
        rollouts=["5x2x3"],
        steps=[],
        adapters=[1, 3],
        rounds=2,
        breakdown=True,
        out=str(tmp_path / "figures.json"),
    )
    (figures,) = run(config)["rollouts"]
    assert set(figures["rounds"]) == {"rollout", "learn", "rollout, 3 adapters", "learn, 3 adapters", "peak"}
    assert set(figures["breakdown"]) == {"rollout", "learning", "rollout, 3 adapters", "learning, 3 adapters"}
    assert all(of_round["tokens"] == 30 for of_round in figures["rounds"]["rollout, 3 adapters"])
    printed = capsys.readouterr().out
    assert "rl_lora, rollout, 3 adapters" in printed
    assert "times" in printed


def test_prompts_are_dealt_out_to_adapters_of_different_seeds(tmp_path: Path) -> None:
    bench = Bench(ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32"))
    bench.fresh(2)
    prompts = bench.prompts(3)
    groups, _ = bench.sample(prompts, Shape(3, 2, 3), 0, 2)
    assert [group.adapter for group in groups] == ["bench", "bench1", "bench"]
    one, other = (bench.policy.bank[name].flat for name in ("bench", "bench1"))
    assert not one.equal(other)
    before = other.clone()
    bench.learn(groups)
    assert not other.equal(before), "every adapter learns from its own"
    # What another adapter computed of a prefix is of no use: the prompt of the second is read in full.
    together, dealt_out = (bench.rollout_costs(prompts[:2], Shape(2, 2, 3), n)["flops"] for n in (1, 2))
    ((_, prefix),) = find_shared_prefixes((None, ids) for ids in prompts[:2])
    assert dealt_out - together == 2 * bench.n_linear * len(prefix)


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
    with pytest.raises(ValueError, match="leave adapters out, or the peers"):
        run(BenchmarkConfig(peer=["trl"], peer_python=sys.executable, adapters=[1, 8]))
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        run(BenchmarkConfig(rounds=0))
    with pytest.raises(ValueError, match=r"adapters\[1\] must be >= 1"):
        run(BenchmarkConfig(adapters=[1, 0]))
    with pytest.raises(ValueError, match="adapters must be different numbers"):
        run(BenchmarkConfig(adapters=[8, 8]))
