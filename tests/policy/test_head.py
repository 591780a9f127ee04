"""The output head: log-probabilities, entropies and gradients of full logits, without full logits.

Oracles are float64 and hold the whole matrix; memory is what torch is seen to allocate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
)

from rl_lora.config import LearnerConfig
from rl_lora.kernels import vocabulary_softmax
from rl_lora.learner.learner import Learner
from rl_lora.policy import head
from rl_lora.policy.head import Head
from rl_lora.policy.head_check import check_head
from rl_lora.policy.policy import Policy
from tests.oracles import episode, group, turn
from tests.tiny import EOS_ID, PAD_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer, token_ids

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation allocates: results that live in an argument do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, x.numel())
        return out


def oracle(h: Tensor, y: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(y) and entropy from the whole matrix, (N,) and (N,), in the dtype of h."""
    logits = h @ head.weight.to(h.dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(h.dtype)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, y[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def random_head(
    N: int, V: int, d: int, *, bias: bool, scale: float, softcap: float | None
) -> tuple[Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, d, generator=generator)
    b = torch.randn(V, generator=generator) if bias else None
    h = torch.randn(N, d, generator=generator)
    return Head(weight, b, scale, softcap), h, torch.randint(V, (N,), generator=generator)


@pytest.fixture(params=["torch", "C++"])
def softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes the softmax over the vocabulary."""
    if request.param == "torch":
        monkeypatch.setattr(vocabulary_softmax, "supports", lambda *_: False)
    elif vocabulary_softmax.library(torch.float32) is None:
        pytest.skip("GCC, and AVX2 or AVX-512 are not here")


@pytest.mark.usefixtures("softmax")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 23),
    rows_at_a_time=st.integers(1, 25),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.125, 2.0]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
)
def test_logprobs_entropy_and_gradient_are_those_of_full_logits(
    N: int, rows_at_a_time: int, bias: bool, scale: float, softcap: float | None, temperature: float
) -> None:
    V = 37
    W, h, y = random_head(N, V, 8, bias=bias, scale=scale, softcap=softcap)
    loss_weights = torch.linspace(-1, 2, N)
    ours = h.clone().requires_grad_()
    exact = h.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_ELEMENTS", rows_at_a_time * V)
        patch.setattr(head, "BLOCK_ELEMENTS", (rows_at_a_time + 1) // 2 * V)
        logprobs, entropy = W.logprobs(ours, y, temperature)
    expected, expected_entropy = oracle(exact, y, W, temperature)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    (logprobs * loss_weights).exp().sum().backward()
    (expected * loss_weights).exp().sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * float(exact.grad.abs().max()))


@pytest.mark.usefixtures("softmax")
def test_without_a_gradient_the_values_are_the_same() -> None:
    W, h, y = random_head(9, 31, 8, bias=True, scale=0.5, softcap=4.0)
    with torch.no_grad():
        bare = W.logprobs(h, y, 0.8)
    for a, b in zip(bare, W.logprobs(h.requires_grad_(), y, 0.8), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("softmax")
def test_certainty_is_neither_nan_nor_a_gradient() -> None:
    """Logits thousands apart: p is exactly one or zero."""
    W = Head(torch.eye(4) * 1e4)
    h = torch.eye(4).requires_grad_()
    logprobs, entropy = W.logprobs(h, torch.tensor([0, 1, 2, 0]))
    logprobs.sum().backward()
    assert torch.equal(logprobs, torch.tensor([0.0, 0, 0, -1e4]))
    assert torch.equal(entropy, torch.zeros(4))
    assert h.grad is not None
    assert not h.grad[:3].any()
    assert h.grad.isfinite().all()


@pytest.mark.usefixtures("softmax")
def test_bfloat16_hidden_states_keep_float32_logprobs() -> None:
    W, h, y = random_head(16, 33, 8, bias=False, scale=1.0, softcap=None)
    W, h = Head(W.weight.bfloat16()), h.bfloat16().requires_grad_()
    logprobs, entropy = W.logprobs(h, y)
    expected, expected_entropy = oracle(h.detach().double(), y, W, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 0.1  # the product itself is rounded to 8 bits
    assert (entropy - expected_entropy).abs().max() < 0.1
    logprobs.sum().backward()
    assert h.grad is not None
    assert h.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("softmax")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, softcap, temperature", [(1.0, None, 1.0), (0.5, None, 0.6), (2.0, 5.0, 1.5)])
def test_gradients_in_bfloat16_are_those_of_full_logits(
    scale: float, softcap: float | None, temperature: float, bias: bool
) -> None:
    """As far as the rounding of logits allows; the same in C++ and in torch."""
    W, h, y = random_head(24, 301, 32, bias=bias, scale=scale, softcap=softcap)
    W = replace(W, weight=0.2 * W.weight.bfloat16(), bias=None if W.bias is None else W.bias.bfloat16())
    ours = h.bfloat16().requires_grad_()
    exact = ours.detach().double().requires_grad_()
    (found, _), (expected, _) = W.logprobs(ours, y, temperature), oracle(exact, y, W, temperature)
    found.exp().sum().backward()
    expected.exp().sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert (found - expected).abs().max() < 0.05
    off = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert off < 0.02


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("N, V", [(100, 512), (400, 512), (100, 2048)])
def test_no_tensor_is_larger_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch, N: int, V: int, softcap: float | None
) -> None:
    chunk, d = 4096, 16
    assert max(N * d, chunk) < N * V / 4
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    W, h, y = random_head(N, V, d, bias=True, scale=0.5, softcap=softcap)
    h.requires_grad_()
    with LargestTensor() as largest:
        W.logprobs(h, y, 0.7)[0].sum().backward()
    assert largest.numel <= max(chunk, N * d)


def test_the_meter_sees_a_matrix_of_logits() -> None:
    W, h, y = random_head(100, 512, 16, bias=True, scale=0.5, softcap=None)
    with LargestTensor() as largest:
        oracle(h.requires_grad_(), y, W, 1.0)[0].sum().backward()
    assert largest.numel == 100 * 512


def test_a_learners_step_never_holds_the_logits_of_all_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    V, chunk = 4001, 8192
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )
    policy = Policy(model, tiny_tokenizer(chat_template=False))
    policy.bank.add("a")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    prompt = token_ids(1, 8)[0].tolist()
    groups = [
        group(*(episode(turn(prompt, 12, seed=i, logprobs=[-8.3] * 12), reward=i % 2) for i in range(8)))
        for _ in range(2)
    ]
    N = sum(e.n_tokens for g in groups for e in g.episodes)
    with LargestTensor() as largest:
        (stats,) = Learner(policy, LearnerConfig(max_sampler_learner_kl=9, tokens_per_microbatch=256)).step(groups)
    assert stats.n_tokens_learned == N == 192
    assert stats.grad_norm
    scores = 2 * 2 * (8 + 8 * 11) ** 2  # heads x rows x L x L, should an attention kernel write them out
    assert largest.numel <= max(chunk, scores) < N * V / 16


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_the_head_is_read_off_the_model(arch: str) -> None:
    model = tiny_model(arch)
    ids = token_ids(2, 7)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(Head.of(model).logits(hidden), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_scales_and_caps_of_the_config_are_applied() -> None:
    model = tiny_model("llama")
    plain = Head.of(model)
    model.config.logits_scaling, model.config.final_logit_softcapping = 8.0, 2.0
    capped, h = Head.of(model), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(capped.logits(h), 2 * torch.tanh(plain.logits(h) / 8 / 2))
    model.config.logits_scaling, model.config.logit_scale, model.config.final_logit_softcapping = None, 0.0625, None
    torch.testing.assert_close(Head.of(model).logits(h), plain.logits(h) / 16)
    model.config.logit_scale = None
    assert Head.of(model).scale == 1.0


HEADS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "cohere": (CohereConfig(**SMALL, num_attention_heads=4, logit_scale=0.7), {"scale": 0.7}),
    "granite": (GraniteConfig(**SMALL, num_attention_heads=4, logits_scaling=3.0), {"scale": 1 / 3}),
    "hyperclovax": (HyperCLOVAXConfig(**SMALL, num_attention_heads=4, logits_scaling=3.0), {"scale": 3.0}),
    "falcon_h1": (
        FalconH1Config(
            **SMALL,
            num_attention_heads=4,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=16,
            lm_head_multiplier=0.039,
        ),
        {"scale": 0.039},
    ),
    "recurrent_gemma": (
        RecurrentGemmaConfig(
            **SMALL, num_attention_heads=4, lru_width=32, attention_window_size=16, logits_soft_cap=30.0
        ),
        {"softcap": 30.0},
    ),
    "gemma2": (
        Gemma2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=20.0),
        {"softcap": 20.0},
    ),
}


def model_with_head(name: str, dtype: torch.dtype, larger: float = 1.0) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(HEADS[name][0]).to(dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(larger)
    return model


def check(model: PreTrainedModel, head: Head) -> None:
    ids = token_ids(2, 9)
    with torch.no_grad():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    check_head(model, head, ids, states, 1e-3 if head.weight.dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_scales_and_caps_are_read_by_all_their_names(name: str, dtype: torch.dtype) -> None:
    model = model_with_head(name, dtype)
    head, expected = Head.of(model), {"scale": 1.0, "softcap": None} | HEADS[name][1]
    assert (head.scale, head.softcap) == (pytest.approx(expected["scale"]), expected["softcap"])
    check(model, head)


@pytest.mark.parametrize("larger", [1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_a_forgotten_scale_or_cap_is_told_from_rounding(name: str, dtype: torch.dtype, larger: float) -> None:
    """However small the logits of the check are, and however coarse their type."""
    model = model_with_head(name, dtype, larger)
    linear = model.get_output_embeddings()
    for forgetful in (Head(linear.weight, linear.bias), replace(Head.of(model), scale=Head.of(model).scale * 1.01)):
        with pytest.raises(ValueError, match=r"more than a linear layer, a scale and a soft cap .* where we compute a"):
            check(model, forgetful)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_whose_linear_layer_is_not_its_weights_is_told_from_rounding(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits * 1.1)
    with pytest.raises(ValueError, match="gives something else than its weights"):
        check(model, Head.of(model))
    model = tiny_model("llama", dtype=dtype)
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    with pytest.raises(ValueError, match="not the hidden states times a number"):
        check(model, Head.of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_before_the_linear_layer_is_a_scale(dtype: torch.dtype) -> None:
    """As MiniCPM3 and Inkling have it."""
    model = tiny_model("llama", dtype=dtype)
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0] / 12,))
    model.config.logits_scaling = 12.0
    check(model, Head.of(model))
    with pytest.raises(ValueError, match="where we compute"):
        check(model, replace(Head.of(model), scale=1.0))


def test_tokens_that_only_fill_up_the_vocabulary_have_no_logits() -> None:
    model = tiny_model("llama")
    model.config.unpadded_vocab_size = 250
    with pytest.raises(ValueError, match="logits of 258 tokens, its config says 250"):
        check(model, Head.of(model))
    model.register_forward_hook(lambda module, inputs, out: out.__class__(logits=out.logits[..., :250]))
    check(model, Head.of(model))


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear output head"):
        Head.of(model)
