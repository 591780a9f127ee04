"""The policy: one frozen base, its bank of adapters, and the conversation format. Everything is one forward pass.

Left out: sampling (`native_sampler.py`), the loss (`learner.py`), and any second copy of the base.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl_lora.attention.interface import Layout, shared_prefix_attention_of
from rl_lora.attention.kv_cache import Decode, Nodes, Recorder
from rl_lora.attention.tree import Tree
from rl_lora.config import ModelConfig
from rl_lora.kernels.verify import difference
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.bank import AdapterBank
from rl_lora.policy import loading
from rl_lora.policy.chat import Chat
from rl_lora.policy.default_choice import settled
from rl_lora.policy.head import Head
from rl_lora.policy.head_check import check_head
from rl_lora.policy.hooks import recomputing
from rl_lora.system.dtype import Dtype, compute_dtype
from rl_lora.system.memory import ready_memory
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL

WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights that may hold NaN and infinity."""


class Policy:
    """A causal language model with adapters.

    Args:
        model: any `transformers` causal LM. It is frozen, and put into evaluation mode: no dropout, so that the sampler
            and the learner compute the same function.
        stop_tokens, template_kwargs: see `Chat`.
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
        check_finite(model)
        self.model = model.eval()
        self.name = name or str(model.config._name_or_path)
        self.bank = AdapterBank(model)
        self.chat = Chat(tokenizer, model.generation_config, stop_tokens, template_kwargs)
        self.head = Head.of(model, may_pack=self.bank.may_pack)
        self.backbone = model.base_model
        parameters = inspect.signature(self.backbone.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"  # as Mamba calls it
        self.device = self.bank.device
        self.dtype = self.head.weight.dtype
        self.context_length = loading.context_length(model.config)
        """Tokens that a prompt and its completion may have together."""
        self.cache_bytes_per_token = 0
        """Of the keys and values of all layers; known where prompts are shared."""
        self.not_shared: str | None = None
        """Why prompts are not shared by their completions, or None where they are."""
        self.not_shared = self._self_check()

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
        """Load a base by name: the default, a local folder, or a hub id (`models.py`).

        `dtype` "auto" is bfloat16 where the device multiplies it fast (see `compute_dtype`), else float32.
        """
        device = torch.device(device)
        if device.type == "cpu":
            ready_memory()
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
        """What a user should know of the base and of what an adapter leaves alone in it, a line each."""
        lines = []
        if self.name == EMBEDDED_MODEL:
            lines.append(
                f"this base is {HUB_MODEL} from a 4-bit file (GGUF Q4_1), unpacked: not quite the model itself, which "
                f"--model.name {HUB_MODEL} is"
            )
        if alone := self.bank.left_alone(adapter):
            parts = ", ".join(f"{n} linear layers of {part}" for part, n in alone.items())
            lines.append(f"adapts the language model; {parts} are left alone")
        return lines

    def hidden(
        self,
        tokens: Tensor,
        adapters: Sequence[str | None],
        layout: Layout | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        recompute: Sequence[nn.Module] = (),
    ) -> Tensor:
        """Last hidden states, (B, L, d), of tokens int64 (B, L).

        Without a layout the model's own causal attention runs: rows are single sequences, padded on the right.
        `recompute`: layers that a backward pass computes again (`recompute.py`).
        """
        kwargs: dict[str, Any] = {} if layout is None else {"layout": layout}
        setting = partial(self.setting, adapters, layout)
        with setting(), recomputing(recompute, setting):
            output = self.backbone(
                input_ids=tokens,
                position_ids=positions,
                use_cache=cache is not None,
                **{self._cache_name: cache},
                **kwargs,
            )
        return output.last_hidden_state.to(self.dtype)  # Mamba keeps float32 beside weights of bfloat16

    @contextmanager
    def setting(self, adapters: Sequence[str | None], layout: Layout | None) -> Iterator[None]:
        """What the model's layers run in."""
        attention = nullcontext() if layout is None else shared_prefix_attention_of(self.model)
        with self.bank.route(adapters), attention:
            yield

    def prefill(
        self,
        prompts: Sequence[tuple[str | None, tuple[int, ...]]],
        past: Nodes | None = None,
        past_of_prompt: Sequence[int] = (),
    ) -> tuple[Nodes, Tensor]:
        """Keys and values of prompts, each with its adapter, and the hidden states behind their last tokens, (P, d).

        With `past`, a prompt begins with the tokens of that node of it, and only the rest is computed.
        """
        adapters, ids = zip(*prompts, strict=True)
        if past is not None:
            ids = tuple(x[past.lengths[node] :] for x, node in zip(ids, past_of_prompt, strict=True))
        lengths = np.array([len(x) for x in ids])
        spans = [(int(stop - n), int(n), -1) for stop, n in zip(lengths.cumsum(), lengths, strict=True)]
        tree = Tree(spans, self.device, past, past_of_prompt)
        tokens = torch.tensor([list(itertools.chain(*ids))], device=self.device)
        recorder = Recorder()
        of_tokens = [adapter for adapter, n in zip(adapters, lengths, strict=True) for _ in range(n)]
        hidden = self.hidden(tokens, of_tokens, tree, tree.positions, recorder)
        keys, values = ([tree.nodes(x) for x in xs] for xs in (recorder.keys, recorder.values))
        return Nodes(keys, values, lengths), hidden[0, tree.last()]

    def cache(self) -> Cache:
        """An empty one of the model's own, for `hidden` without a layout."""
        return DynamicCache(config=self.model.config.get_text_config())

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
        try:
            plain = self.hidden(ids, [None] * 3)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} is not supported: its layers cannot be run without its head "
                f"({type(error).__name__}: {error})"
            ) from error
        check_head(self.model, self.head, ids, plain, self._tolerance)
        if reason := self._check_sharing(ids, plain):
            self._check_cache(ids, plain)
        return reason

    def _check_sharing(self, ids: Tensor, plain: Tensor) -> str | None:
        """ids: (3, n), of which two begin alike; plain: (3, n, d), what the model's own attention makes of them."""
        n = ids.shape[1]
        p = n // 2
        none = [None] * 3
        try:
            # A trunk, a prompt behind it, two completions behind that; and a sequence of its own.
            spans = [(0, p // 2, -1), (p // 2, p - p // 2, 0), (p, n - p, 1), (n, n - p, 1), (2 * n - p, n, -1)]
            tree = Tree(spans, self.device)
            tokens = torch.cat([ids[0], ids[1, p:], ids[2]])[None]
            flat = self.hidden(tokens, [None] * tokens.shape[1], tree, tree.positions)[0]
            found = torch.stack([flat[:n], torch.cat([flat[:p], flat[n : 2 * n - p]]), flat[2 * n - p :]])
            if not (gap := difference(found, plain)) <= self._tolerance:
                return f"its packed hidden states differ from the plain ones by {gap:.2g} of their spread"
            if has_window(self.model.config) and tree.windows == {None}:
                return "its config has an attention window that its layers do not pass on"
            a, b = (tuple(ids[i, :p].tolist()) for i in (0, 2))
            decode = Decode(self.device, short_trunk=0)
            decode.trunks, _ = self.prefill([(None, a[: p // 2])])
            decode.trunks.append_empty()
            prompts, behind = self.prefill([(None, a), (None, b)], decode.trunks, [0, 1])
            states = [behind[[0, 0, 1]]]
            pairs = zip(prompts.keys, prompts.values, strict=True)
            self.cache_bytes_per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for kv in pairs for x in kv)
            decode.admit(prompts, np.array([0, 1]), np.array([0, 0, 1]))
            for t, m in ((p, 2), *((t, 1) for t in range(p + 2, n))):  # two tokens at once, then one by one
                positions = decode.begin(m)
                states.extend(self.hidden(ids[:, t : t + m], none, decode, positions, decode).unbind(1))
                decode.advance(m)
            if not (gap := difference(torch.stack(states, 1), plain[:, p - 1 :])) <= self._tolerance:
                return f"its decoded hidden states differ from the plain ones by {gap:.2g} of their spread"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _check_cache(self, ids: Tensor, plain: Tensor) -> None:
        p = ids.shape[1] // 2
        try:
            cache = self.cache()
            steps = [self.hidden(part, [None] * 3, cache=cache) for part in (ids[:, :p], *ids[:, p:].split(1, 1))]
            gap = difference(torch.cat(steps, 1), plain)
            found = f"its hidden states differ by {gap:.2g} of their spread from those of a whole sequence"
        except Exception as error:
            gap, found = float("nan"), f"{type(error).__name__}: {error}"
        if not gap <= self._tolerance:
            raise ValueError(f"{type(self.model).__name__} cannot be decoded token by token with its cache: {found}")

    @property
    def _tolerance(self) -> float:
        """Largest mean difference, in standard deviations, that rounding explains."""
        return 1e-3 if self.dtype == torch.float32 else 0.1


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if there are weights that are NaN or infinite, and names them."""
    wrong = []
    for name, weight in model.named_parameters():
        if weight.dtype in WIDE and weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
            n = int(weight.isfinite().logical_not().sum())
            wrong.append(f"{name} ({n:,} of {weight.numel():,})")
    if wrong:
        raise ValueError(
            f"weights of {model.config._name_or_path or type(model).__name__} are NaN or infinite: "
            f"{', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}; the file is damaged, or "
            "the training that wrote it diverged: get it anew"
        )


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers see a part of the context only."""
    text = config.get_text_config()
    if (layer_types := getattr(text, "layer_types", None)) is not None:
        return bool({"sliding_attention", "chunked_attention"} & set(layer_types))
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True) is not False
