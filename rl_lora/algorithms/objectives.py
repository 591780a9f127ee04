"""What a step maximises, token by token. A few lines an objective, each with its source.

An objective takes the learner's and the sampler's log-probabilities and the advantages, float32 (N,), and returns the
objective of each token (N,) and whether its gradient is cut off, bool (N,), or None where none is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lora.algorithms.registry import Record, Registry

if TYPE_CHECKING:  # arithmetic is done by the tensors themselves
    from torch import Tensor

Tokens = tuple["Tensor", "Tensor | None"]


@dataclass(frozen=True)
class Aggregation:
    """How tokens are weighed against each other: the sum of weight(n) x objective over all tokens, divided by the sum
    of share(n) over all episodes of a step, of all processes. n: tokens of an episode, at least 1 for `weight`."""

    weight: Callable[[int], float]
    share: Callable[[int], float]


TOKEN_MEAN = Aggregation(weight=lambda n: 1.0, share=lambda n: n)
"""The mean over all tokens of a step (DAPO: arXiv:2503.14476, eq. 12)."""


@dataclass(frozen=True)
class Objective(Record):
    """An objective, and what it asks of a run."""

    advantage: str = "mean"
    """The advantage that it takes unless another is asked for."""
    aggregation: Aggregation = TOKEN_MEAN
    needs_rewards: bool = True
    """Whether it learns from rewards. Without, a group has one episode, and its advantage is 1."""
    needs_samples: bool = True
    """Whether it learns from the policy's own samples. Without, from an environment's demonstrations, whose behaviour
    log-probabilities mean nothing."""


def objective(name: str = "", **properties: Any) -> Callable[[Callable[..., Tokens]], Objective]:
    """Make a function the record of an objective; its keyword-only parameters are the options."""
    return lambda function: Objective(function, name, **properties)


@objective()
def reinforce(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor) -> Tokens:
    """Importance ratio times advantage, unclipped: (p_learner / p_sampler) A.

    An importance-weighted policy gradient ("LoRA Without Regret", Schulman et al. 2025). At ratio 1 its gradient is
    that of REINFORCE, A grad log p.
    """
    return (logprobs - behaviour_logprobs).exp() * advantages, None


@objective(advantage="standardized")
def grpo(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tokens:
    """Clipped ratio of GRPO and PPO: min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A).

    PPO: arXiv:1707.06347, eq. 7; GRPO: arXiv:2402.03300, eq. 3.
    """
    ratio = (logprobs - behaviour_logprobs).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return free.minimum(bounded), bounded < free


@objective(advantage="none", needs_rewards=False, needs_samples=False)
def likelihood(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor) -> Tokens:
    """Maximum likelihood of an environment's demonstrations; nothing is sampled.

    A log p, at A = 1. Its gradient is that of `reinforce` at ratio 1.
    """
    return logprobs * advantages, None


OBJECTIVES = Registry("objective", Objective, reinforce, grpo, likelihood)
"""All that a name can stand for, in the order of the help."""
