"""The forward pass: from tokens, each with its adapter or none, to hidden states."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from rl_lora.attention.interface import Layout, shared_prefix_attention_of
from rl_lora.attention.kv_cache import KeyValues, PrefillCache
from rl_lora.attention.tree import SpanTree
from rl_lora.lora.bank import AdapterBank
from rl_lora.policy.fused import fuse, rotaries_of, rotating
from rl_lora.policy.head import Head
from rl_lora.policy.hooks import recomputing
from rl_lora.policy.loading import context_length


class AdaptedModel:
    """A frozen causal language model, its output head, and its bank of adapters.

    Args:
        model: any `transformers` causal LM. It is frozen, and put into evaluation mode: no dropout, so that the sampler
            and the learner compute the same function.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self.bank = AdapterBank(model)
        fuse(model)
        self._rotaries = rotaries_of(model)
        self.head = Head.of(model, copies=self.bank.copies)
        self.backbone = model.base_model
        parameters = inspect.signature(self.backbone.forward).parameters
        names = ("cache", "cache_params")  # in transformers 5.24 and newer; of Mamba, before
        self._cache_name = next((name for name in names if name in parameters), "past_key_values")
        self.device = self.bank.device
        self.dtype = self.head.weight.dtype
        self.context_length = context_length(model.config)
        """Tokens that a prompt and its completion may have together."""

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

        adapters: of each token of a tree (L), or of each row (B); None is the bare base.
        layout: which tokens see which. Without one the model's own causal attention runs: rows are single sequences,
        padded on the right.
        positions: int64 (B, L); by default those of the model's own.
        cache: keys and values of earlier tokens; those of these tokens are added to them.
        recompute: layers that a backward pass computes again (`hooks.recomputing`).
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
        """Inside, the model's layers apply these adapters, and attend as the layout says."""
        attention = nullcontext() if layout is None else shared_prefix_attention_of(self.model)
        with self.bank.route(adapters), attention, rotating(self._rotaries):
            yield

    def prefill(
        self,
        prompts: Sequence[tuple[str | None, tuple[int, ...]]],
        past: KeyValues | None = None,
        past_of_prompt: Sequence[int] = (),
    ) -> tuple[KeyValues, Tensor]:
        """Keys and values of prompts, each with its adapter, and the hidden states behind their last tokens, (P, d).

        With `past`, prompt p begins with the tokens of its node `past_of_prompt[p]`, and only the rest is computed.
        """
        adapters, ids = zip(*prompts, strict=True)
        if past is not None:
            ids = tuple(x[past.lengths[node] :] for x, node in zip(ids, past_of_prompt, strict=True))
        lengths = np.array([len(x) for x in ids])
        spans = [(int(stop - n), int(n), -1) for stop, n in zip(lengths.cumsum(), lengths, strict=True)]
        tree = SpanTree(spans, self.device, past, past_of_prompt)
        tokens = torch.tensor([list(itertools.chain(*ids))], device=self.device)
        cache = PrefillCache()
        of_tokens = [adapter for adapter, n in zip(adapters, lengths, strict=True) for _ in range(n)]
        hidden = self.hidden(tokens, of_tokens, tree, tree.positions, cache)
        keys, values = ([tree.nodes(x) for x in xs] for xs in (cache.keys, cache.values))
        return KeyValues(keys, values, lengths), hidden[0, tree.last()]

    def cache(self) -> Cache:
        """An empty KV cache of the model's own, for `hidden` without a layout."""
        return DynamicCache(config=self.model.config.get_text_config())
