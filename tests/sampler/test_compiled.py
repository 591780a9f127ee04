"""Compiled layers compute what the layers compute, for all sizes that a rollout comes to, and follow the weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lora.config import EpisodeConfig
from rl_lora.kernels import adapted_linear
from rl_lora.kernels.frozen_linear import MOST_ROWS
from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled import ROWS, CompiledLayers, should_compile, unavailable
from rl_lora.sampler.compiled_layer import CompiledLayer, OperationTrace
from rl_lora.sampler.factory import make_sampler
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Request
from tests.oracles import tiny_policy
from tests.tiny import randomize, token_ids

pytestmark = pytest.mark.skipif(unavailable(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def requests(n_prompts: int, n: int, adapter: str | None, begin: int = 0, seed: int = 0) -> list[Request]:
    """Prompts of several lengths that begin with the same `begin` tokens; completions end at 3 to 17 tokens."""
    common = token_ids(1, begin, 99)[0].tolist() if begin else []
    return [
        Request(
            (*common, *token_ids(1, 3 + 5 * (i % 3), seed + i)[0].tolist()),
            n=n,
            max_tokens=(3, 17, 9)[i % 3],
            adapter=adapter,
            seed=(seed, i),
        )
        for i in range(n_prompts)
    ]


class Counted:
    """Compiled layers of a policy, and how often they ran, or stepped aside."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch):
        self.ran, self.stepped_aside = 0, 0
        holds = CompiledLayer.holds

        def counted(layer: Any, inputs: Any) -> bool:
            result = holds(layer, inputs)
            self.ran += result
            self.stepped_aside += not result
            return result

        monkeypatch.setattr(CompiledLayer, "holds", counted)
        self.layers = CompiledLayers(policy)


def both(layers: CompiledLayers, asked: list[Request], **options: Any) -> tuple[list[Completion], list[Completion]]:
    """Completions with and without compiled layers."""
    samplers = [NativeSampler(layers.policy, **options, compiled=compiled) for compiled in (layers, None)]
    found, expected = ([c for of in sampler.generate(asked) for c in of] for sampler in samplers)
    assert layers.fast_path.failed is None
    return found, expected


def assert_alike(found: list[Completion], expected: list[Completion], tolerance: float = 1e-4) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_compiled_steps_draw_what_the_layers_draw(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(arch, ["a"])
    counted = Counted(policy, monkeypatch)
    layers = counted.layers
    # One compiled layer of each kind does for all of these: rows come and leave, buffers grow, prompts differ.
    assert_alike(*both(layers, requests(7, 5, "a")))
    kinds = {"llama": 1, "gemma3": 2, "gpt2": 1}[arch]
    assert len(layers.compiled) == kinds
    assert counted.ran > 20
    for asked, options in (
        (requests(3, 2, "a", seed=1), {}),
        (requests(9, 1, "a", seed=2), {}),  # a completion a prompt
        (requests(11, 4, "a", seed=3), {"max_rows": 8}),
        (requests(5, 3, "a", begin=20, seed=4), {}),  # the common beginning is copied into each prompt
        ([replace(request, temperature=0.0) for request in requests(6, 3, "a", seed=5)], {"check_every": 4}),
    ):
        counted.ran = 0
        assert_alike(*both(layers, asked, **options))
        assert counted.ran
        assert len(layers.compiled) == kinds
    # Another adapter of the same form runs the same compiled layers on its own weights.
    randomize(policy.bank.add("b", rank=2), seed=7)
    randomize(policy.bank.add("c", rank=2), seed=8)
    found, expected = both(layers, requests(4, 3, "b"))
    assert_alike(found, expected)
    assert_alike(*both(layers, requests(4, 3, "c")))
    assert [c.logprobs for c in found] != [c.logprobs for c in both(layers, requests(4, 3, "c"))[0]]
    # "a" is of another rank: the same layers where factors are inputs, others where torch adds them.
    assert len(layers.compiled) == (
        2 * kinds if arch == "gpt2" and adapted_linear.serves("cpu", policy.dtype) else kinds
    )


def test_long_common_beginnings_mixed_batches_and_the_bare_base(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama", ["a", "b"])
    counted = Counted(policy, monkeypatch)
    layers = counted.layers
    assert_alike(*both(layers, requests(5, 3, None, begin=70)))
    assert counted.ran
    counted.ran = 0
    others = [replace(r, prompt_ids=r.prompt_ids[::-1][-70:] + r.prompt_ids) for r in requests(4, 2, None, begin=70)]
    assert_alike(*both(layers, [*requests(4, 2, None, begin=70), *others]))
    assert counted.ran
    randomize(policy.bank.add("c", rank=3, targets=["q_proj", "down_proj"]), seed=3)
    for names, kinds in ((("a", "b"), 3), ((None, "a"), 3), (("c", "b", None, "a"), 3), (("c", None), 4)):
        counted.ran = 0
        assert_alike(*both(layers, [request for name in names for request in requests(3, 2, name)]))
        assert counted.ran
        assert len(layers.compiled) == kinds  # as many as there are sets of sites with adapters
    counted.ran = 0
    assert_alike(*both(layers, requests(1, 5, "a")))
    assert not counted.ran  # a single prompt is left to the layers


def test_batches_that_mix_adapters_which_torch_adds_are_left_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("gpt2", ["a", "b"])
    counted = Counted(policy, monkeypatch)
    assert_alike(*both(counted.layers, [*requests(3, 2, "a"), *requests(3, 2, "b")]))
    assert not counted.ran


def test_the_made_up_rows_carry_adapters_of_all_sites() -> None:
    """However many adapters there are: what a compiled layer does not see among them it would not add."""
    policy = tiny_policy("llama")
    names = [f"all{i}" for i in range(ROWS + 3)]
    for name in names:
        policy.bank.add(name, targets="q_proj")
    policy.bank.add("other", targets=["q_proj", "down_proj"])
    carried = CompiledLayers(policy)._of_rows([*names[:5], "other", None, *names[5:]])
    assert len(carried) == ROWS
    assert len(set(carried)) == 3
    assert {"other", None} < set(carried)


def test_more_rows_than_products_are_packed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama", ["a"])
    if not policy.bank.copies:
        pytest.skip("weights are not packed here")
    counted = Counted(policy, monkeypatch)
    layers = counted.layers
    asked = [replace(request, max_tokens=3) for request in requests(40, 14, "a")]
    assert_alike(*both(layers, asked, max_rows=40 * 14))
    assert MOST_ROWS < 40 * 14
    assert counted.stepped_aside


def test_weights_that_change_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama", ["a"], dtype=torch.bfloat16)
    counted = Counted(policy, monkeypatch)
    layers = counted.layers
    asked = [replace(request, temperature=0.0) for request in requests(4, 3, "a")]
    first, _ = both(layers, asked)
    adapter = policy.bank["a"]
    with torch.no_grad():
        adapter.flat.mul_(-3)
    adapter.version += 1
    second, expected = both(layers, asked)
    assert counted.ran
    assert len(layers.compiled) == 1
    assert [c.token_ids for c in first] != [c.token_ids for c in second]
    agree = [len(shared(a.token_ids, b.token_ids)) / len(b.token_ids) for a, b in zip(second, expected, strict=True)]
    assert sum(agree) / len(agree) > 0.7  # bfloat16 decides close calls otherwise, for one of the four prompts
    assert_close_at_first(second, expected)


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def assert_close_at_first(found: list[Completion], expected: list[Completion]) -> None:
    for a, b in zip(found, expected, strict=True):
        n = len(shared(a.token_ids, b.token_ids))
        assert a.logprobs[:n] == pytest.approx(b.logprobs[:n], abs=0.15)


def test_what_cannot_be_followed_is_decoded_all_the_same() -> None:
    policy = tiny_policy("mixtral", ["a"])
    plain = [c for of in NativeSampler(policy).generate(requests(3, 2, "a")) for c in of]
    layers = CompiledLayers(policy)
    sampler = NativeSampler(policy, compiled=layers)
    with pytest.warns(UserWarning, match="without compiled layers"):
        found = [c for of in sampler.generate(requests(3, 2, "a")) for c in of]
    assert layers.fast_path.failed
    assert found == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is said once
        sampler.generate(requests(3, 2, "a"))


def test_a_compiled_layer_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama", ["a"])
    of = CompiledLayer.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, *args: Any) -> Any:
        layer = of(cls, *args)
        function = layer.function
        layer.function = lambda *inputs: function(*inputs) * 1.01
        return layer

    monkeypatch.setattr(CompiledLayer, "of", classmethod(wrong))
    with pytest.warns(UserWarning, match="compiled layer 0 differs from the layer by"):
        NativeSampler(policy, compiled=CompiledLayers(policy)).generate(requests(3, 2, "a"))


def test_a_trace_tells_operations_and_their_arguments_apart() -> None:
    weights = [torch.randn(4, 4), torch.randn(4, 4)]
    x = torch.randn(3, 4)

    def trace(work: Any) -> OperationTrace:
        with OperationTrace([x]) as recorded:
            work(x)
        return recorded

    def linear(weight: Tensor, scale: float = 2.0) -> Any:
        return lambda x: (x @ weight * scale).softmax(-1)

    a, b = (trace(linear(weight)) for weight in weights)
    assert a.lines == b.lines
    assert a.constants[0] is weights[0]
    assert b.constants[0] is weights[1]
    assert trace(linear(weights[0], 3.0)).lines != a.lines
    assert trace(linear(torch.randn(4, 5))).lines != a.lines
    assert trace(lambda x: (x @ weights[0] * 2.0).softmax(0)).lines != a.lines


def test_what_was_decoded_before_changes_nothing() -> None:
    policy = tiny_policy("llama", ["a"])
    asked = requests(5, 3, "a")
    completions = []
    for before in ([requests(3, 2, "a", seed=1), requests(9, 1, "a", seed=2)], []):
        layers = CompiledLayers(policy)
        for others in (*before, asked):
            found = NativeSampler(policy, compiled=layers).generate(others)
        assert layers.compiled
        completions.append(found)
    assert completions[0] == completions[1]


def test_a_tensor_that_may_be_another_in_each_step_is_no_constant() -> None:
    policy = tiny_policy("llama", ["a"])
    layers = CompiledLayers(policy)
    layer = layers.layers[1]
    noise, forward = torch.zeros(48), layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) + noise
    with pytest.warns(UserWarning, match="layer 1 reads a tensor .48,. that may be another in each step"):
        NativeSampler(policy, compiled=layers).generate(requests(3, 2, "a"))


@pytest.mark.parametrize(
    ("wanted", "steps", "compiles"), [(None, 999, False), (None, 1000, True), (True, 0, True), (False, 1000, False)]
)
def test_many_decoding_steps_are_worth_compiling(wanted: bool | None, steps: int, compiles: bool) -> None:
    assert should_compile(wanted, "cpu", steps) == compiles
    sampler = make_sampler(tiny_policy("llama"), EpisodeConfig(), compile=compiles)
    assert isinstance(sampler, NativeSampler)
    assert (sampler.compiled is not None) == compiles


def test_without_a_compiler() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "C++ compiler" in str(unavailable(torch.device("cpu")))
        assert not should_compile(None, "cpu", 1000)
        with pytest.raises(ValueError, match=r"model\.compile is true, but no C\+\+ compiler"):
            should_compile(True, "cpu")
