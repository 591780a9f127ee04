"""Models with fused norms, rotary embeddings and MLPs compute what they computed; what got fused is said here."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from rl_lora.kernels import elementwise
from rl_lora.policy import fused
from rl_lora.policy.forward import AdaptedModel
from tests.tiny import PAD_ID, VOCAB_SIZE, randomize, tiny_model, token_ids

pytestmark = pytest.mark.skipif(elementwise.library() is None, reason="GCC, and AVX2 or AVX-512 are not here")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD_ID,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
}
OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mistral": (MistralConfig, SIZES),
    "gemma2": (Gemma2Config, {**SIZES, "head_dim": 16}),
    "phi3": (Phi3Config, SIZES),
    "phi3 partial": (
        Phi3Config,
        {
            **SIZES,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": (Olmo2Config, SIZES),
}
LLAMA = {"input_layernorm", "post_attention_layernorm", "norm"}
GEMMA = LLAMA | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
HEADS = {"q_norm", "k_norm"}
FUSED: dict[str, tuple[set[str], bool]] = {
    "llama": (LLAMA | {"mlp"}, True),
    "qwen2": (LLAMA | {"mlp"}, True),
    "mistral": (LLAMA | {"mlp"}, True),
    "qwen3": (LLAMA | HEADS | {"mlp"}, True),
    "gemma2": (GEMMA | {"mlp"}, True),
    "gemma3": (GEMMA | HEADS | {"mlp"}, True),
    "olmo2": (HEADS | {"post_attention_layernorm", "post_feedforward_layernorm", "norm", "mlp"}, True),
    "phi3": (LLAMA, True),
    "phi3 partial": (LLAMA, True),
    "gpt2": (set(), False),
    "mixtral": (LLAMA, True),
    "qwen3_moe": (LLAMA | HEADS, True),
    "gpt_oss": (LLAMA, False),
}
"""Names of the fused modules, and whether the rotary embedding is."""


def model_of(arch: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random, norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if arch in OTHERS:
            cls, fields = OTHERS[arch]
            model: PreTrainedModel = AutoModelForCausalLM.from_config(cls(**fields)).eval()
        else:
            model = tiny_model(arch)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.add_(0.5 * torch.rand_like(weight))
    return model.to(dtype=dtype)  # type: ignore[call-arg]


def fused_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "forward" in module.__dict__}


def results(model: AdaptedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states, and a gradient of an adapter on all layers."""
    if "a" not in model.bank.adapters:
        randomize(model.bank.add("a", rank=2), 0)
    adapter = model.bank["a"]
    adapter.zero_grad()
    with torch.enable_grad():
        hidden = model.hidden(ids, ["a"] * len(ids))
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    assert adapter.flat.grad is not None
    return hidden.detach().float(), adapter.flat.grad


def unfused(arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> AdaptedModel:
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "library", lambda: None)
        return AdaptedModel(model_of(arch, dtype))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).pow(2).mean().sqrt() / b.std())


@pytest.mark.parametrize("arch", FUSED)
def test_it_computes_what_the_model_computes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 to rounding; in bfloat16 as near to float32 as the model itself."""
    ids = token_ids(3, 12)
    plain_model, plain = unfused(arch, torch.float32, monkeypatch), model_of(arch)
    assert not fused_modules(plain_model.model)
    model = AdaptedModel(plain)
    names, rotary = FUSED[arch]
    found = fused_modules(model.model)
    assert {name.rpartition(".")[2] for name in found} == names
    if names:
        assert len(found) == sum(name.rpartition(".")[2] in names for name, _ in model.model.named_modules())
    assert bool(model._rotaries) == rotary
    exact = results(plain_model, ids)
    for a, b in zip(results(model, ids), exact, strict=True):
        assert gap(a, b) < 1e-5
    if arch in ("qwen3_moe", "mixtral", "gpt_oss"):
        return  # rounding sends tokens to other experts
    narrow = results(AdaptedModel(model_of(arch, torch.bfloat16)), ids)
    torchs = results(unfused(arch, torch.bfloat16, monkeypatch), ids)
    for a, b, c in zip(narrow, torchs, exact, strict=True):
        assert gap(a, c) < 1.25 * gap(b, c)


def test_names_copies_and_pickles() -> None:
    """Weights keep their names; a copy computes with its own weights."""
    ids = token_ids(2, 6)
    before = set(model_of("qwen3").state_dict())
    model = AdaptedModel(model_of("qwen3")).model
    assert set(model.state_dict()) == before
    expected = model.base_model(ids).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_modules(other).keys() == fused_modules(model).keys()
        with torch.no_grad():
            assert torch.equal(other.base_model(ids).last_hidden_state, expected)
            for weight in other.parameters():
                weight.zero_()
        assert torch.equal(model.base_model(ids).last_hidden_state, expected)


def test_rotary_embeddings_are_the_models_own_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    model = AdaptedModel(model_of("llama"))
    with model.setting([None], None):
        assert modeling_llama.apply_rotary_pos_emb is not original
        with model.setting([None], None):
            pass
        assert modeling_llama.apply_rotary_pos_emb is not original
    assert modeling_llama.apply_rotary_pos_emb is original
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))  # somebody else's stays
    with model.setting([None], None):
        assert modeling_llama.apply_rotary_pos_emb(1, 2, 3) == (1, 2)


class RMSNorm(nn.Module):
    def __init__(self, form: str = ""):
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.ones(32)), 1e-6, form

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.form == "mean":
            wide = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (0 if self.form == "eps" else self.eps))
        return self.weight * (wide * scale).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, act: nn.Module, factor: float = 1.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32) for _ in range(3))
        self.act_fn, self.factor = act, factor

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return h * self.factor


@pytest.mark.parametrize(
    ("module", "is_fused"),
    [
        (RMSNorm(), True),
        (RMSNorm("mean"), False),
        (RMSNorm("eps"), False),
        (nn.LayerNorm(32, bias=False), False),
        (nn.RMSNorm(32, elementwise_affine=False), False),
        (MLP(nn.SiLU()), True),
        (MLP(nn.GELU("tanh")), True),
        (MLP(nn.GELU()), False),
        (MLP(nn.SiLU(), 0.5), False),
    ],
    ids=str,
)
def test_only_what_computes_the_same_is_fused(module: nn.Module, is_fused: bool) -> None:
    fused.fuse(module)
    assert ("forward" in module.__dict__) == is_fused


@pytest.mark.parametrize("module", [RMSNorm(), MLP(nn.SiLU())], ids=["norm", "mlp"])
def test_what_the_kernels_do_not_serve_is_the_modules_own(module: nn.Module) -> None:
    """Weights of a norm that are trained, and other dtypes."""
    module = copy.deepcopy(module)
    fused.fuse(module)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    own = type(module).forward(module, x)
    for a, b in zip(found, torch.autograd.grad(own.square().sum(), [x, *module.parameters()]), strict=True):
        torch.testing.assert_close(a, b)
    for dtype in (torch.float16, torch.float64):
        module.to(dtype)
        assert torch.equal(module(x.to(dtype)), type(module).forward(module, x.to(dtype)))
