"""How far a fast path is from the plain computation: what each of them is asked before it is used."""

from __future__ import annotations

from torch import Tensor


def difference(found: Tensor, expected: Tensor) -> float:
    """The mean difference, in standard deviations of what is expected; NaN where there is one."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().mean() / expected.std().clamp_min(1e-9))
