"""The policy: one frozen base, its bank of adapters, and the conversation format. Everything is one forward pass.

Left out: sampling (`sampler.py`), the loss (`learner.py`), and any second copy of the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl_lora import models
from rl_lora.attention import Decode, Packed, Prefix, shared_prefix_attention_of
from rl_lora.chat import Chat
from rl_lora.config import ModelConfig
from rl_lora.head import Head
from rl_lora.lora import AdapterBank
from rl_lora.types import Batch

Dtype = Literal["auto", "float32", "bfloat16"]


class Policy:
    """A causal language model with adapters.

    Args:
        model: any `transformers` causal LM. It is frozen, and put into evaluation mode: no dropout, so that the sampler
            and the learner compute the same function.
        stop_tokens: see `Chat`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        stop_tokens: Sequence[str] = (),
    ):
        self.model = model.eval()
        self.name = name or str(model.config._name_or_path)
        self.bank = AdapterBank(model)
        self.chat = Chat(tokenizer, model.generation_config, stop_tokens)
        self.head = Head.of(model)
        self.backbone = model.base_model
        parameters = inspect.signature(self.backbone.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"  # as Mamba calls it
        self.device = self.bank.device
        self.dtype = self.head.weight.dtype
        self.context_length = context_length(model.config)
        """Tokens that a prompt and its completion may have together."""
        self.not_shared: str | None = None
        """Why prompts are not shared by their completions, or None where they are."""
        self.not_shared = self._self_check()

    @classmethod
    def load(
        cls,
        name: str = models.DEFAULT_MODEL,
        *,
        dtype: Dtype = "auto",
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        stop_tokens: Sequence[str] = (),
    ) -> Policy:
        """Load a base by name: the embedded default, a local folder, or a hub id (`models.py`).

        `dtype` "auto" is bfloat16 where the device multiplies it natively, else float32.
        """
        device = torch.device(device)
        tokenizer = models.load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = models.load_causal_lm(
            name, dtype=compute_dtype(dtype, device), device=device, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer, name=name, stop_tokens=stop_tokens)

    @classmethod
    def from_config(cls, config: ModelConfig, device: torch.device | str) -> Policy:
        """`load` what a configuration says."""
        return cls.load(
            config.name,
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            stop_tokens=config.stop_tokens,
        )

    def hidden(
        self,
        tokens: Tensor,
        adapters: Sequence[str | None],
        layout: Packed | Decode | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Last hidden states, (B, L, d), of tokens int64 (B, L).

        Without a layout the model's own causal attention runs: rows are single sequences, padded on the right.
        """
        kwargs: dict[str, Any] = {} if layout is None else {"layout": layout}
        with self.bank.route(adapters), nullcontext() if layout is None else shared_prefix_attention_of(self.model):
            output = self.backbone(
                input_ids=tokens,
                position_ids=positions,
                use_cache=cache is not None,
                **{self._cache_name: cache},
                **kwargs,
            )
        return output.last_hidden_state

    def cache(self) -> Cache:
        """An empty one of the model's own, for `hidden` without a layout."""
        return DynamicCache(config=self.model.config.get_text_config())

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of every target of the batch, and the entropy of its distribution: float32 (N,), (N,)."""
        layout = None if self.not_shared else Packed(batch.positions, batch.segments)
        positions = None if layout is None else batch.positions
        hidden = self.hidden(batch.tokens, batch.adapters, layout, positions)
        return self.head.logprobs(hidden.flatten(0, 1)[batch.index], batch.targets, temperature)

    @torch.no_grad()
    def _self_check(self) -> str | None:
        """Compare the shared-prefix path with the model's own attention on random tokens; a reason if they differ.

        Also proves that `head` computes the model's own logits, and that the model's own cache, where it is needed,
        decodes what its forward computes; those have no fallback and raise.
        """
        generator = torch.Generator().manual_seed(0)
        n = min(24, self.context_length // 2)
        ids = torch.randint(self.head.weight.shape[0], (3, n), generator=generator).to(self.device)
        ids[1, : n // 2] = ids[0, : n // 2]  # two completions behind one prompt, and a sequence of its own
        plain = self.hidden(ids, [None] * 3)
        logits = self.head.logits(plain.flatten(0, 1)).view(*ids.shape, -1)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        if not (gap := _gap(logits, own)) <= self._tolerance:
            raise ValueError(
                f"the output head of {type(self.model).__name__} is more than a linear layer, a scale and a soft cap: "
                f"its logits differ from ours by {gap:.2g} of their spread; it is not supported"
            )
        if reason := self._check_sharing(ids, plain):
            self._check_cache(ids, plain)
        return reason

    def _check_sharing(self, ids: Tensor, plain: Tensor) -> str | None:
        """ids: (3, n), of which two begin alike; plain: (3, n, d), what the model's own attention makes of them."""
        n = ids.shape[1]
        p = n // 2
        tokens = torch.stack([torch.cat([ids[0], ids[1, p:]]), torch.cat([ids[2], ids[2, p:] * 0])])
        position = torch.arange(n, device=self.device)
        positions = torch.cat([position, position[p:]]).expand(2, -1)
        segments = torch.zeros_like(tokens)
        segments[0, p:n], segments[0, n:], segments[1, n:] = 1, 2, -1
        try:
            layout = Packed(positions, segments)
            packed = self.hidden(tokens, [None] * 2, layout, positions)
            packed = torch.stack([packed[0, :n], torch.cat([packed[0, :p], packed[0, n:]]), packed[1, :n]])
            if not (gap := _gap(packed, plain)) <= self._tolerance:
                return f"its packed hidden states differ from the plain ones by {gap:.2g} of their spread"
            if has_window(self.model.config) and layout.windows == {None}:
                return "its config has an attention window that its layers do not pass on"
            prefix = Prefix()
            prompts, at = ids[[0, 2], :p], position[:p].expand(2, -1)
            self.hidden(prompts, [None] * 2, Packed(at, at * 0), at, prefix)
            rows = torch.tensor([0, 0, 1], device=self.device)
            decode = Decode(prefix, torch.full((2,), p, device=self.device), rows, n - p)
            for t in range(p, n):
                step = self.hidden(ids[:, t : t + 1], [None] * 3, decode, decode.positions, decode)
                decode.advance()
                if not (gap := _gap(step[:, 0], plain[:, t])) <= self._tolerance:
                    return f"its decoded hidden states differ from the plain ones by {gap:.2g} of their spread"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _check_cache(self, ids: Tensor, plain: Tensor) -> None:
        p = ids.shape[1] // 2
        try:
            cache = self.cache()
            steps = [self.hidden(part, [None] * 3, cache=cache) for part in (ids[:, :p], *ids[:, p:].split(1, 1))]
            gap = _gap(torch.cat(steps, 1), plain)
            found = f"its hidden states differ by {gap:.2g} of their spread from those of a whole sequence"
        except Exception as error:
            gap, found = float("nan"), f"{type(error).__name__}: {error}"
        if not gap <= self._tolerance:
            raise ValueError(f"{type(self.model).__name__} cannot be decoded token by token with its cache: {found}")

    @property
    def _tolerance(self) -> float:
        """Largest mean difference, in standard deviations, that rounding explains."""
        return 1e-3 if self.dtype == torch.float32 else 0.1


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean() / b.float().std().clamp_min(1e-9))


def context_length(config: PreTrainedConfig) -> int:
    """Tokens that a model's positions reach; practically unlimited where its config names no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers see a part of the context only."""
    text = config.get_text_config()
    if (layer_types := getattr(text, "layer_types", None)) is not None:
        return bool({"sliding_attention", "chunked_attention"} & set(layer_types))
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True) is not False


def compute_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of the base and of the activations; adapters are float32 always."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    if device.type == "cpu" and any(supported() for supported in native if supported):
        return torch.bfloat16
    return torch.float32
