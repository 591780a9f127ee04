"""The self-check of a model: before it is used, the paths that we take through it are compared with its own.

The output head and the model's own cache have no fallback: a model in which they compute something else is refused. One
in which shared prompts compute something else is run with a prompt for each completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rl_lora.attention.kv_cache import DecodeCache
from rl_lora.attention.tree import SpanTree
from rl_lora.kernels.verify import Mismatch, reason_of, require_close
from rl_lora.policy.forward import AdaptedModel
from rl_lora.policy.head_check import check_head


@dataclass(frozen=True)
class SelfCheck:
    """What the self-check found."""

    not_shared: str | None
    """Why prompts cannot be shared by their completions, or None where they can."""
    cache_bytes_per_token: int
    """Of the keys and values of all layers; 0 where prompts cannot be shared."""


@torch.no_grad()
def self_check(model: AdaptedModel) -> SelfCheck:
    """Compare shared prompts, the output head, and the cache where it is needed, with the model on random tokens.

    Raises:
        ValueError: the layers cannot be run without the head, or head or cache compute something else.
    """
    generator = torch.Generator().manual_seed(0)
    n = min(24, model.context_length // 2)
    ids = torch.randint(model.head.weight.shape[0], (3, n), generator=generator).to(model.device)
    ids[1, : n // 2] = ids[0, : n // 2]  # two completions behind one prompt, and a sequence of its own
    try:
        plain = model.hidden(ids, [None] * 3)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model.model).__name__} is not supported: its layers cannot be run without its head "
            f"({type(error).__name__}: {error})"
        ) from error
    check_head(model.model, model.head, ids, plain, _tolerance(model))
    found = _check_sharing(model, ids, plain)
    if found.not_shared:
        _check_cache(model, ids, plain)
    return found


def _check_sharing(model: AdaptedModel, ids: Tensor, plain: Tensor) -> SelfCheck:
    """ids: (3, n), of which two begin alike; plain: (3, n, d), what the model's own attention makes of them."""
    try:
        packed, windows = _packed(model, ids)
        require_close("its packed hidden states differ from the plain ones", packed, plain, _tolerance(model))
        if has_window(model.model.config) and windows == {None}:
            raise Mismatch("its config has an attention window that its layers do not pass on")
        decoded, cache_bytes_per_token = _decoded(model, ids)
        plain = plain[:, ids.shape[1] // 2 - 1 :]
        require_close("its decoded hidden states differ from the plain ones", decoded, plain, _tolerance(model))
    except Exception as error:  # whatever a foreign model may raise: there is a way without shared prompts
        return SelfCheck(reason_of(error), 0)
    return SelfCheck(None, cache_bytes_per_token)


def _packed(model: AdaptedModel, ids: Tensor) -> tuple[Tensor, set[int | None]]:
    """Hidden states (3, n, d) from one packed sequence, and the attention windows that its layers passed on."""
    n = ids.shape[1]
    p = n // 2
    # The beginning of a prompt, the rest of it, two completions behind that; and a sequence of its own.
    spans = [(0, p // 2, -1), (p // 2, p - p // 2, 0), (p, n - p, 1), (n, n - p, 1), (2 * n - p, n, -1)]
    tree = SpanTree(spans, model.device)
    tokens = torch.cat([ids[0], ids[1, p:], ids[2]])[None]
    flat = model.hidden(tokens, [None] * tokens.shape[1], tree, tree.positions)[0]
    return torch.stack([flat[:n], torch.cat([flat[:p], flat[n : 2 * n - p]]), flat[2 * n - p :]]), tree.windows


def _decoded(model: AdaptedModel, ids: Tensor) -> tuple[Tensor, int]:
    """Hidden states (3, n - p + 1, d) of the last token of prompts of p = n // 2 tokens and of what is decoded behind
    them, and the bytes of the keys and values of a token."""
    n = ids.shape[1]
    p = n // 2
    a, b = (tuple(ids[i, :p].tolist()) for i in (0, 2))
    decode = DecodeCache(model.device, short_prefix=0)
    decode.prefixes, _ = model.prefill([(None, a[: p // 2])])
    decode.prefixes.append_empty()
    prompts, behind = model.prefill([(None, a), (None, b)], decode.prefixes, [0, 1])
    states = [behind[[0, 0, 1]]]
    cache_bytes_per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (*prompts.keys, *prompts.values))
    decode.admit(prompts, np.array([0, 1]), np.array([0, 0, 1]))
    for t, m in ((p, 2), *((t, 1) for t in range(p + 2, n))):  # two tokens at once, then one by one
        positions = decode.begin(m)
        states.extend(model.hidden(ids[:, t : t + m], [None] * 3, decode, positions, decode).unbind(1))
        decode.advance(m)
    return torch.stack(states, 1), cache_bytes_per_token


def _check_cache(model: AdaptedModel, ids: Tensor, plain: Tensor) -> None:
    """ids, plain: as for `_check_sharing`. Raises ValueError if the model's own cache computes something else."""
    p = ids.shape[1] // 2
    try:
        cache = model.cache()
        steps = [model.hidden(part, [None] * 3, cache=cache) for part in (ids[:, :p], *ids[:, p:].split(1, 1))]
        what = "its hidden states differ from those of a whole sequence"
        require_close(what, torch.cat(steps, 1), plain, _tolerance(model))
    except Exception as error:
        raise ValueError(
            f"{type(model.model).__name__} cannot be decoded token by token with its cache: {reason_of(error)}"
        ) from error


def _tolerance(model: AdaptedModel) -> float:
    """Largest mean difference, in standard deviations, that rounding explains."""
    return 1e-3 if model.dtype == torch.float32 else 0.1


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers see a part of the context only."""
    text = config.get_text_config()
    if (layer_types := getattr(text, "layer_types", None)) is not None:
        return bool({"sliding_attention", "chunked_attention"} & set(layer_types))
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True) is not False
