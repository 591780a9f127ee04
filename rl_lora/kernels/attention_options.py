"""How scores become probabilities in a model's attention: said by the model, and read by every implementation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """What a model's attention asks for beside queries, keys and values."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    """(H,), or (B, H) of each block: a logit of each head that takes probability away from every key (gpt-oss)."""
