"""An adapter means the same to PEFT on mixtures of experts, with shared experts or dense layers, and on Mamba kinds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rl_lora.lora.adapter import Adapter
from rl_lora.lora.bank import AdapterBank
from rl_lora.lora.peft_io import load_adapter, save_adapter
from tests.tiny import EOS_ID, PAD_ID, VOCAB_SIZE, randomize, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.*(config file in|fetch remote file|is_gradient_checkpointing|fused)"),
    pytest.mark.filterwarnings("ignore:experts of an unknown form"),
    pytest.mark.filterwarnings("ignore:.* layers stay without an adapter"),
]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "initializer_range": 0.12,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Experts, routed and shared, and the layers before them that have none.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "n_group": 1,
    "topk_group": 1,
    # Attention by latent vectors, linear attention, Mamba.
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_chunk_size": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
INDEXED = {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
HYBRID = ["mamba", "attention", "mamba"]
USUAL: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "hunyuan_v1_moe": {},
    "laguna": {},
    "mamba": {},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8},
    "qwen2_moe": {},
    "qwen3_next": {},
}
RARE: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "beam": {},
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v32": INDEXED,
    "exaone_moe": {},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64},
    "falcon_mamba": {},
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB_SIZE, "top_k_experts": 2},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "attention_head_dim": 32,
        "num_mem_blocks": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "flex_olmo": {},
    "flint": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt_oss": {},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": HYBRID, "shared_intermediate_size": 48},
    "granitemoeshared": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": LATENT,
    "kolibri1": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {},
    "longcat_flash": {**LATENT, "zero_expert_num": 1, "expert_ffn_hidden_size": 32, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "moe_router_topk": 1},
}
ALL = [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)]
IDS = token_ids(2, 9)


def tiny_config(model_type: str) -> Any:
    """A small configuration of a model type: what of `SIZES` it knows, and its own fields."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    known = {*default.to_dict(), *getattr(cls, "attribute_map", {})}
    fields = {name: value for name, value in SIZES.items() if name in known or name.endswith("token_id")}
    layers = fields.get("num_hidden_layers", 3)
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    kept_as = getattr(cls, "attribute_map", {}).get("layer_types", "layer_types")
    if kinds and kept_as == "layer_types" and not isinstance(getattr(cls, kept_as, None), property):
        fields["layer_types"] = (kinds * layers)[:layers]
    if {"dense", "sparse"}.isdisjoint(getattr(default, "mlp_layer_types", None) or []):
        fields.pop("mlp_layer_types", None)
    fields |= {**USUAL, **RARE}[model_type]
    if model_type == "nemotron_h":
        fields["num_hidden_layers"] = len(fields["layers_block_type"])
    return cls(**fields)


def tiny(model_type: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def our_logits(bank: AdapterBank, name: str | None) -> Tensor:
    with bank.route([name] * len(IDS)):
        return logits(bank.model)


def close(theirs: Tensor, ours: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.03


@pytest.mark.parametrize("model_type", ALL)
def test_peft_loads_ours_with_equal_logits(model_type: str, tmp_path: Path) -> None:
    bank = AdapterBank(tiny(model_type))
    sites = bank.match("all-linear")
    odd = [*[site.name for site in sites if site.peft == "weight"][:1], sites[0].name]
    ranks, alphas = dict.fromkeys(odd, 3), dict.fromkeys(odd, 7.5)
    adapter = bank.put(Adapter("a", sites, rank=4, alpha=12, active_experts=2, ranks=ranks, alphas=alphas))
    folder = save_adapter(randomize(adapter, 1), tmp_path / "a", "tiny")
    ours = our_logits(bank, "a")
    close(logits(peft.PeftModel.from_pretrained(tiny(model_type), folder).eval()), ours, our_logits(bank, None))
    twin = load_adapter(folder, bank, "twin")
    assert (twin.sites, twin.ranks, twin.alphas) == (adapter.sites, adapter.ranks, adapter.alphas)
    assert torch.equal(our_logits(bank, "twin"), ours)


@pytest.mark.parametrize("model_type", ALL)
def test_we_load_peft_s_with_equal_logits(model_type: str, tmp_path: Path) -> None:
    bank = AdapterBank(tiny(model_type))
    sites = bank.match("all-linear")
    modules = [site.name for site in sites if not site.experts and site.peft == "module"]
    parameters = [
        f"{site.name}.weight" if site.peft == "weight" else site.name for site in sites if site.name not in modules
    ]
    patterns = {re.escape(name): 5 for name in parameters[:1]} | {modules[-1].rpartition(".")[2]: 3}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern=patterns,
        task_type="CAUSAL_LM",
    )
    load_peft_s(model_type, config, bank, tmp_path)


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_next", "dots1"])
def test_we_load_what_peft_makes_of_the_experts_names_of_old(model_type: str, tmp_path: Path) -> None:
    names = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    load_peft_s(model_type, peft.LoraConfig(r=2, target_modules=names), AdapterBank(tiny(model_type)), tmp_path)


def load_peft_s(model_type: str, config: peft.LoraConfig, bank: AdapterBank, folder: Path) -> None:
    model = peft.get_peft_model(tiny(model_type), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder))
    load_adapter(folder, bank, "theirs")
    close(logits(model.eval()), our_logits(bank, "theirs"), our_logits(bank, None))


def test_layers_that_peft_refuses_are_left_out_and_named_before_training(tmp_path: Path) -> None:
    bank = AdapterBank(tiny("mamba"))
    with pytest.warns(
        UserWarning, match=r"3 layers stay without an adapter.*layers.0.mixer.out_proj .*name out_proj in"
    ):
        adapter = bank.add("a")
    assert {site.name.rpartition(".")[2] for site in adapter.sites} == {"in_proj", "x_proj", "dt_proj"}
    with pytest.warns(UserWarning, match="PEFT will not load adapter 'b': it stands on .*out_proj"):
        adapter = bank.add("b", targets=["in_proj", "out_proj"])
    folder = save_adapter(adapter, tmp_path / "b", "tiny")
    with pytest.raises(ValueError, match="out_proj"):
        peft.PeftModel.from_pretrained(tiny("mamba"), folder)
    with pytest.warns(UserWarning, match="PEFT will not load"):
        assert load_adapter(folder, AdapterBank(tiny("mamba"))).sites == adapter.sites
