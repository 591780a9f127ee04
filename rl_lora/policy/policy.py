"""The policy: one frozen base, its bank of adapters, and the conversation format.

Left out: sampling (`sampler/`), the loss (`learner/`), and any second copy of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl_lora.config import ModelConfig
from rl_lora.lora.adapter import Adapter
from rl_lora.policy import loading
from rl_lora.policy.chat import Chat
from rl_lora.policy.default_choice import settled
from rl_lora.policy.forward import AdaptedModel
from rl_lora.policy.self_check import self_check
from rl_lora.system.dtype import Dtype, compute_dtype
from rl_lora.system.memory import ready_memory
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL
from rl_lora.system.plurals import counted
from rl_lora.system.waiting import watch_neighbours


class Policy(AdaptedModel):
    """A causal language model with adapters, in which everything that its fast paths rely on has been checked.

    Args:
        model: any `transformers` causal LM; see `AdaptedModel`.
        stop_tokens, template_kwargs: see `Chat`.

    Raises:
        ValueError: the model has weights that are not finite, or computes what this package cannot (`self_check.py`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        stop_tokens: Sequence[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        if model.device.type == "cpu":
            watch_neighbours()
        loading.check_finite(model)
        super().__init__(model)
        self.name = name or str(model.config._name_or_path)
        self.chat = Chat(tokenizer, model.generation_config, stop_tokens, template_kwargs)
        found = self_check(self)
        self.not_shared = found.not_shared
        """Why prompts are not shared by their completions, or None where they are."""
        self.cache_bytes_per_token = found.cache_bytes_per_token
        """Of the keys and values of all layers; 0 where prompts are not shared."""

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        dtype: Dtype = "auto",
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        stop_tokens: Sequence[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Load a base by name: the default, a local folder, or a hub id (`loading.py`).

        `dtype` "auto" is bfloat16 where the device multiplies it fast (see `compute_dtype`), else float32.
        """
        device = torch.device(device)
        if device.type == "cpu":
            ready_memory()
            watch_neighbours()
        name = settled(name)
        tokenizer = loading.load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = loading.load_causal_lm(
            name, dtype=compute_dtype(dtype, device), device=device, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer, name=name, stop_tokens=stop_tokens, template_kwargs=template_kwargs)

    @classmethod
    def from_config(cls, config: ModelConfig, device: torch.device | str) -> Policy:
        """`load` what a configuration says of the base; `compile` is a sampler's (`sampler/compiled.py`)."""
        return cls.load(
            config.name,
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            stop_tokens=config.stop_tokens,
            template_kwargs=config.template_kwargs,
        )

    def remarks(self, adapter: Adapter) -> list[str]:
        """Remarks for the user, a line each: on the base, and on the layers that an adapter leaves alone in it."""
        lines = []
        if self.name == EMBEDDED_MODEL:
            lines.append(
                f"this base is {HUB_MODEL} from a 4-bit file (GGUF Q4_1), unpacked: not quite the model itself, which "
                f"--model.name {HUB_MODEL} is"
            )
        if alone := self.bank.left_alone(adapter):
            parts = ", ".join(f"{counted(n, 'linear layer')} of {part}" for part, n in alone.items())
            lines.append(f"adapts the language model; {parts} are left alone")
        return lines
