"""Drawing one token a row from logits, by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row, in two levels: first a block of the vocabulary, then a token in it.

    logits: float32 (R, V), may be overwritten; temperature: (R,), 0 for greedy, or None where all are 1;
    uniforms: (R,) in [0, 1). Returns tokens int64 (R,), and their log-probabilities float32 (R,).
    """
    if temperature is not None:
        logits = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
    p = torch.softmax(logits, -1)
    R, V = p.shape
    n = 1 << (V.bit_length() // 2)  # tokens of a block
    blocks = (p if V % n == 0 else torch.nn.functional.pad(p, (0, -V % n))).view(R, -1, n)
    mass = blocks.sum(-1).cumsum(-1)  # (R, V / n)
    target = _below(uniforms * mass[:, -1], mass[:, -1])[:, None]
    # The first block whose cumulative mass exceeds the target; NaN has none, and is found out by its log-probability.
    block = torch.searchsorted(mass, target, right=True).clamp_max(mass.shape[1] - 1)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1)  # (R, n)
    rest = target - torch.where(block > 0, mass.gather(1, (block - 1).clamp_min(0)), 0)
    token = (block * n + torch.searchsorted(inside, _below(rest, inside[:, -1:]), right=True))[:, 0].clamp_max(V - 1)
    if temperature is not None:
        token = torch.where(temperature == 0, logits.argmax(-1), token)
    return token, p.gather(1, token[:, None])[:, 0].log()


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """x, or the next number under the limit: rounding must not choose a token without probability."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
