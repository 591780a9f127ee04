"""What a step maximises, token by token. A few lines an objective, each with its source.

Every function takes the learner's and the sampler's log-probabilities and the advantages, float32 (N,), and returns the
objective of each token (N,) and whether its gradient is cut off, bool (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Bounds of the importance ratio: 1 - low and 1 + high."""

    low: float = 0.2
    high: float = 0.2


def reinforce(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """(p_learner / p_sampler) A: an importance-weighted policy gradient ("LoRA Without Regret", Schulman et al. 2025).

    At ratio 1 its gradient is that of REINFORCE, A grad log p. Nothing is clipped.
    """
    ratio = torch.exp(logprobs - behaviour_logprobs)
    return ratio * advantages, torch.zeros_like(ratio, dtype=torch.bool)


def grpo(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO: arXiv:1707.06347, eq. 7; GRPO: arXiv:2402.03300, eq. 3)."""
    ratio = torch.exp(logprobs - behaviour_logprobs)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    return torch.minimum(free, bounded), bounded < free


def likelihood(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """A log p, for tokens that were given and not sampled: at A = 1, maximum likelihood.

    Its gradient is that of `reinforce` at ratio 1.
    """
    return logprobs * advantages, torch.zeros_like(logprobs, dtype=torch.bool)


Objective = Callable[[Tensor, Tensor, Tensor, Clip], tuple[Tensor, Tensor]]
OBJECTIVES: dict[str, Objective] = {"reinforce": reinforce, "grpo": grpo, "likelihood": likelihood}
