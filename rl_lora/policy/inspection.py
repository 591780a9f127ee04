"""Faults of a model's settings that show without its weights: name, tokenizer, stop tokens, targets."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from rl_lora.config import ModelConfig
from rl_lora.lora.bank import AdapterBank
from rl_lora.policy import loading
from rl_lora.policy.chat import Chat


def inspect_model(config: ModelConfig, targets: str | list[str] = "all-linear") -> tuple[Chat, int]:
    """The chat format of a model, and its context length in tokens. Raises ValueError for what cannot be."""
    loading.check_model(config.name, config.trust_remote_code)
    tokenizer = loading.load_tokenizer(config.name, config.trust_remote_code)
    chat = Chat(tokenizer, None, config.stop_tokens, config.template_kwargs)
    model_config = loading.load_config(config.name, config.trust_remote_code)
    if targets != "all-linear" and not config.trust_remote_code:
        with torch.device("meta"):
            AdapterBank(AutoModelForCausalLM.from_config(model_config)).match(targets)
    return chat, loading.context_length(model_config)
