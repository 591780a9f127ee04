"""The policy: what it refuses, what it falls back to, and that its fallback is the model too.

A model whose attention is its own (Mamba, Bloom) is trained and sampled without shared prompts, and says so.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Llama4TextConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
)

from rl_lora.attention import interface
from rl_lora.attention.decode_layer import DecodeLayer
from rl_lora.attention.kv_cache import DecodeCache
from rl_lora.config import LearnerConfig
from rl_lora.learner.learner import Learner
from rl_lora.policy.policy import Policy
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Request
from rl_lora.system.dtype import Dtype
from tests.oracles import Oracle, as_turn, episode, gradient, group, relative_error
from tests.tiny import (
    ARCHITECTURES,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    randomize,
    tiny_folder,
    tiny_model,
    tiny_multimodal,
    tiny_tokenizer,
    token_ids,
)

TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
}
STRANGE: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(**TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2),
    "bloom": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
}
"""No attention at all, with a cache of another name; and attention with a bias that ours knows nothing of."""


def strange_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(STRANGE[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # larger than usual, so that what came before visibly matters
    return model.eval()


def policy_of(model: PreTrainedModel) -> Policy:
    return Policy(model, tiny_tokenizer(chat_template=False))


def greedy(policy: Policy, prompt: tuple[int, ...], n: int) -> list[tuple[int, ...]]:
    requests = [Request(prompt, max_tokens=n, temperature=0), Request(prompt[:-1], n=2, max_tokens=n, temperature=0)]
    return [completion.token_ids for row in NativeSampler(policy).generate(requests) for completion in row]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompts_are_shared_in_every_architecture_that_goes_through_the_attention_interface(arch: str) -> None:
    assert policy_of(tiny_model(arch)).not_shared is None


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_with_attention_of_its_own_is_sampled_all_the_same(name: str) -> None:
    policy = policy_of(strange_model(name))
    assert policy.not_shared is not None
    prompt = tuple(token_ids(1, 9)[0].tolist())
    generate: Any = functools.partial(policy.model.generate, do_sample=False, max_new_tokens=8, pad_token_id=PAD_ID)
    long, short = (tuple(generate(torch.tensor([ids]))[0, len(ids) :].tolist()) for ids in (prompt, prompt[:-1]))
    assert greedy(policy, prompt, 8) == [long, short, short]


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_with_attention_of_its_own_is_trained_all_the_same(name: str) -> None:
    policy = policy_of(strange_model(name))
    randomize(policy.bank.add("a", rank=2, alpha=8), 1)
    oracle = Oracle(policy, strange_model(name))
    prompt = tuple(token_ids(1, 9)[0].tolist())
    request = Request(prompt, n=4, max_tokens=6, adapter="a")
    (completions,) = NativeSampler(policy).generate([request])
    rewards = [0.0, 1.0, 0.0, 0.5]
    g = group(*(episode(as_turn(request, c), reward=r) for c, r in zip(completions, rewards, strict=True)))
    n = sum(e.n_tokens for e in g.episodes)
    expected = oracle.gradients(
        [(g, [r - 0.375 for r in rewards])], lambda p, q, advantage: torch.exp(p - q) * advantage, {"a": float(n)}
    )["a"]
    (record,) = Learner(policy, LearnerConfig(max_grad_norm=0)).step([g])
    assert record.sampler_learner_kl is not None
    assert record.sampler_learner_kl < 1e-4
    assert relative_error(gradient(policy.bank["a"].flat), expected) < 1e-3


def nothing_but_nan(self: Any, layer: int, query: Tensor, *_: Any) -> Tensor:
    return torch.full_like(query, torch.nan)


def without_the_window(attend: Any) -> Any:
    return lambda self, layer, query, key, value, options: attend(
        self, layer, query, key, value, replace(options, window=None)
    )


def test_a_window_that_only_the_models_own_mask_knows_of_is_not_shared() -> None:
    """Longer than the self-check's sequences, so that their hidden states could not tell."""
    model = tiny_model("llama")
    model.config.sliding_window = 128
    assert "attention window" in str(policy_of(model).not_shared)


@pytest.mark.parametrize(
    "arch, layout, name, broken, reason",
    [
        ("llama", interface, "attend_on_tree", nothing_but_nan, "packed hidden states differ .* by nan"),
        ("llama", DecodeCache, "attend", nothing_but_nan, "decoded hidden states differ .* by nan"),
        (
            "gemma3",
            interface,
            "attend_on_tree",
            without_the_window(interface.attend_on_tree),
            "packed hidden states differ",
        ),
        ("gpt_oss", DecodeLayer, "attend", without_the_window(DecodeLayer.attend), "decoded hidden states differ"),
        ("llama", DecodeCache, "advance", lambda self, n: None, "decoded hidden states differ"),
        ("llama", interface, "attend_on_tree", None, "TypeError: 'NoneType' object is not callable"),
    ],
)
def test_the_self_check_finds_shared_attention_that_is_not_the_models(
    monkeypatch: pytest.MonkeyPatch, arch: str, layout: Any, name: str, broken: Any, reason: str
) -> None:
    expected = greedy(policy_of(tiny_model(arch)), tuple(range(20)), 5)
    monkeypatch.setattr(layout, name, broken)
    policy = policy_of(tiny_model(arch))
    assert policy.not_shared is not None
    assert re.search(reason, policy.not_shared)
    assert greedy(policy, tuple(range(20)), 5) == expected


def test_a_model_that_forgets_its_cache_is_refused_and_not_sampled_from_its_last_token() -> None:
    model = strange_model("bloom")
    forward = model.base_model.forward

    @functools.wraps(forward)
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "past_key_values": None})

    model.base_model.forward = forgetful
    with pytest.raises(
        ValueError, match=r"BloomForCausalLM cannot be decoded token by token .* by 0\.\d+ standard deviations"
    ):
        policy_of(model)
    rwkv = AutoModelForCausalLM.from_config(RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="RwkvForCausalLM cannot be decoded token by token with its cache"):
        policy_of(rwkv)


@pytest.mark.parametrize("change", [lambda logits: logits * 1.1, lambda logits: logits * torch.nan])
def test_a_head_that_is_more_than_linear_is_refused(change: Any) -> None:
    model = tiny_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: change(logits))
    with pytest.raises(ValueError, match="output head of LlamaForCausalLM is more than a linear layer"):
        policy_of(model)


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[7] = torch.nan  # of a token that the self-check need not see
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = -torch.inf
    with pytest.raises(
        ValueError,
        match=r"NaN or infinite: model\.embed_tokens\.weight \(48 of 12,384\), model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        policy_of(model)


def test_a_model_whose_layers_cannot_be_run_apart_from_its_head_is_refused() -> None:
    """Llama 4's text model says that it is its own base model."""
    config = Llama4TextConfig(**TOKENS, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, head_dim=8)
    config.num_hidden_layers = config.num_attention_heads = config.num_local_experts = 2
    config.num_key_value_heads, config.layer_types, config.no_rope_layers = 2, ["full_attention"] * 2, [1, 1]
    config.moe_layers = []
    with pytest.raises(
        ValueError, match="Llama4ForCausalLM is not supported: its layers cannot be run without its head"
    ):
        policy_of(AutoModelForCausalLM.from_config(config))


def test_mamba_keeps_float32_beside_bfloat16_weights_and_is_taken_all_the_same() -> None:
    model: Any = strange_model("mamba")
    policy = policy_of(model.to(torch.bfloat16))
    assert greedy(policy, tuple(token_ids(1, 9)[0].tolist()), 4)


def test_the_base_is_frozen_in_evaluation_mode_and_keeps_its_own_attention() -> None:
    model = tiny_model("llama").train()
    own = model.config._attn_implementation
    policy = policy_of(model)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    greedy(policy, (1, 2, 3), 2)
    assert model.config._attn_implementation == own


def test_the_layers_of_a_multimodal_model_that_are_left_alone_are_remarked_on() -> None:
    for model, said in ((tiny_multimodal(), True), (tiny_model("llama"), False)):
        policy = Policy(model, tiny_tokenizer(True))
        line = "adapts the language model; 15 linear layers of vision_tower are left alone"
        assert (line in policy.remarks(policy.bank.add("a"))) == said


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_oss"])
def test_in_bfloat16_prompts_are_shared_and_sampler_and_learner_agree_to_rounding(arch: str) -> None:
    policy = policy_of(tiny_model(arch, dtype=torch.bfloat16))
    assert policy.dtype == torch.bfloat16
    assert policy.not_shared is None
    adapter = randomize(policy.bank.add("a", rank=1, alpha=8), 1)
    request = Request(tuple(token_ids(1, 12)[0].tolist()), n=8, max_tokens=10, adapter="a")
    (completions,) = NativeSampler(policy).generate([request])
    g = group(*(episode(as_turn(request, c), reward=float(i)) for i, c in enumerate(completions)))
    (record,) = Learner(policy, LearnerConfig()).step([g])
    assert record.sampler_learner_kl is not None
    assert 0 < record.sampler_learner_kl < 0.05
    assert adapter.flat.dtype == gradient(adapter.flat).dtype == torch.float32


def test_a_policy_is_loaded_from_a_folder_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path, "llama"))
    dtypes: list[Dtype] = ["float32", "bfloat16"]
    for dtype in dtypes:
        policy = Policy.load(folder, dtype=dtype, stop_tokens=["\n"])
        assert policy.dtype == getattr(torch, dtype)
        assert len(policy.chat.stop_ids) == 2


@pytest.mark.parametrize("name", ["cache", "cache_params", "past_key_values"])
def test_a_model_may_call_its_cache_by_any_of_the_names_of_transformers(name: str) -> None:
    def generated(model: PreTrainedModel) -> list[int]:
        policy = policy_of(model)
        assert policy.not_shared is None
        [[completion]] = NativeSampler(policy).generate([Request(tuple(token_ids(1, 9)[0].tolist()), max_tokens=8)])
        return list(completion.token_ids)

    model, expected = tiny_model("llama"), generated(tiny_model("llama"))
    backbone = model.base_model
    forward = backbone.forward
    signature = inspect.signature(forward)
    own = next(n for n in ("cache", "cache_params", "past_key_values") if n in signature.parameters)

    def renamed(**kwargs: Any) -> Any:
        if name in kwargs:  # the model itself keeps to its own name
            kwargs[own] = kwargs.pop(name)
        elif kwargs.get(own) is not None:
            raise TypeError(f"no parameter is called {own}")
        return forward(**kwargs)

    parameters = [p.replace(name=name) if p.name == own else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    backbone.forward = renamed
    assert generated(model) == expected
