"""Tiny random models, a byte-level tokenizer and a model folder, shared by the tests: seeded, and built in moments.

Weights are larger than at a usual initialization, so that attention, experts and adapters visibly matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rl_lora.lora.adapter import Adapter

BYTES = 256
PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = BYTES, BYTES + 1
VOCAB_SIZE = BYTES + 2
SLIDING_WINDOW = 8
"""Of the Gemma 3 and GPT-OSS models: shorter than most sequences of the tests."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.12,
}
_BODY: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _BODY),
    "qwen2": (Qwen2Config, _BODY),
    "qwen3": (Qwen3Config, {**_BODY, "tie_word_embeddings": True}),
    "gemma3": (
        Gemma3TextConfig,
        {**_BODY, "num_hidden_layers": 3, "sliding_window": SLIDING_WINDOW, "layer_types": _LAYER_TYPES},
    ),
    "gpt2": (GPT2Config, {**_COMMON, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mixtral": (MixtralConfig, {**_BODY, **_EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {**_BODY, **_EXPERTS, "num_experts": 6, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            **_BODY,
            **_EXPERTS,
            "num_local_experts": 4,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _LAYER_TYPES[:2],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
}
ARCHITECTURES = list(_CONFIGS)
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DENSE = ["llama", "qwen2", "qwen3", "gemma3", "gpt2"]
MOE = ["mixtral", "qwen3_moe", "gpt_oss"]


def tiny_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal LM of the architecture, on the CPU, in eval mode; the same seed gives the same weights."""
    cls, fields = _CONFIGS[arch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(cls(**fields), experts_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "sinks" in name:
                    parameter.normal_(std=0.1)  # zero by default: a bias that is lost would go unnoticed
    return model.to(dtype=dtype).eval()  # type: ignore[call-arg]


def tiny_multimodal(seed: int = 0) -> PreTrainedModel:
    """Gemma 3 with its vision tower, 15 linear layers, beside the language model of `tiny_model`, 21 of them."""
    text = _CONFIGS["gemma3"][1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return AutoModelForCausalLM.from_config(config).eval()


def randomize(adapter: Adapter, seed: int) -> Adapter:
    """Noise in A and B, so that the adapter changes what the model says. Returns the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=generator) * 0.05)
    return adapter


def tiny_tokenizer(chat_template: bool) -> PreTrainedTokenizerFast:
    """One token a byte, `<pad>` and `<eos>`. The template writes `<|role|>`, a line, the content, `<eos>`, a line."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, EOS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)
    if chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<eos>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
    return tokenizer


def tiny_folder(tmp_path: Path, arch: str, seed: int = 0, chat_template: bool = True) -> Path:
    """A local model folder, as `from_pretrained` reads it: weights, config, tokenizer. Returns its path."""
    folder = tmp_path / f"tiny-{arch}"
    tiny_model(arch, seed).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens (rows, length), special tokens excluded."""
    return torch.randint(BYTES, (rows, length), generator=torch.Generator().manual_seed(seed))
