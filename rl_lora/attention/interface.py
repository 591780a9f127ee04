"""The entry into any `transformers` model: its own forward runs, and only its attention is ours.

Models whose attention goes elsewhere (state space models, own kernels) take the plain path: see `Policy.not_shared`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rl_lora.attention import cpu, flex
from rl_lora.attention.decode_layer import DecodeLayer
from rl_lora.attention.kv_cache import DecodeCache
from rl_lora.attention.padded import padded_attention
from rl_lora.attention.tree import SpanTree
from rl_lora.kernels.attention_options import AttentionOptions

IMPLEMENTATION = "rl_lora_shared_prefix"
UNDERSTOOD = {
    "sliding_window",
    "softcap",
    "s_aux",
    "layout",
    "position_ids",
    "use_cache",
    "is_causal",
    "cache_position",
}
"""What a model may tell its attention."""

Layout = SpanTree | DecodeCache | DecodeLayer
"""How the tokens of a forward pass lie, and what each of them may attend to."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of `AttentionInterface`: (B, H, Q, D) -> (B, Q, H, D). `layout`: the forward's."""
    unknown = {name for name, value in kwargs.items() if value is not None} - UNDERSTOOD
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}")
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    layout: Layout = kwargs["layout"]
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(layout, SpanTree):
        out = attend_on_tree(layout, layer, query, key, value, options)
    else:
        out = layout.attend(layer, query, key, value, options)
    return out.transpose(1, 2).contiguous(), None


def attend_on_tree(
    tree: SpanTree, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """query: (1, H, N, D); key, value: (1, H_kv, N, D). Returns (1, H, N, D), by the fastest that may be used."""
    tree.windows.add(options.window)
    if flex.supports(tree, query, options) and flex.verified(query, key, value, options):
        return flex.fused_attention(tree, query, key, value, options)
    if cpu.supports(tree, query, key, value, layer=layer):
        return cpu.native_attention(tree, query, key, value, options, layer)
    return padded_attention(tree, query, key, value, options, layer)


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)


@contextmanager
def shared_prefix_attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is `shared_prefix_attention`; its forward then needs a `layout`."""
    config = model.config
    previous = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = previous
