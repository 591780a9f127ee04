"""The options of a model's attention: the model sets them, and every implementation reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """How the products of queries and keys become probabilities."""

    scaling: float
    """Factor of the products."""
    window: int | None = None
    """Tokens that a query sees, its own included; None: all before it."""
    softcap: float | None = None
    """Bound c of the scores, c tanh(score / c), as in Gemma 2; None: no bound."""
    sinks: Tensor | None = None
    """(H,), or (B, H) of each block: a logit of each head that takes probability away from every key (gpt-oss)."""
