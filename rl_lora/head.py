"""Log-probabilities of given tokens from hidden states, without the matrix of logits ever existing.

The gradient of log p(y) with respect to the hidden state, J = (W[y] - p W) / T, does not depend on what the loss will
be. So the forward pass, which has p of a chunk at hand, stores J (N, d) and the backward pass is one multiplication:
nothing of size N x V is kept, and no logit is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model: logits = cap(scale * (W h + b))."""

    weight: Tensor
    """(V, d)"""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """Read off the model's output embeddings and config (Gemma's soft-capping, Granite's and Cohere's scales)."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no linear output head; only causal language models can be trained"
            )
        config = model.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, d) -> float32 (N, V)"""
        logits = F.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its distribution, in nats, at the given temperature.

        hidden: (N, d); targets: int64 (N,). Returns float32 (N,), (N,); only the first carries a gradient.
        """
        return _TokenLogprobs.apply(hidden, targets, self, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        N = len(targets)
        logprobs, entropy = hidden.new_empty(N, dtype=torch.float32), hidden.new_empty(N, dtype=torch.float32)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, d)
        chunk = max(1, CHUNK_ELEMENTS // len(head.weight))
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            y = targets[part, None]
            logits = head.logits(hidden[part])  # (C, V)
            uncapped_slope = None if head.softcap is None else 1 - (logits / head.softcap) ** 2
            logits /= temperature
            chosen = logits.gather(1, y)[:, 0]
            log_z = torch.logsumexp(logits, -1)
            logprobs[part] = chosen - log_z
            p = torch.softmax(logits, -1)
            entropy[part] = log_z - torch.linalg.vecdot(p, logits)
            if jacobian is None:
                continue
            p.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))  # d log p(y) / d logits, times T
            if uncapped_slope is not None:
                p *= uncapped_slope
            jacobian[part] = (p.to(head.weight.dtype) @ head.weight) * (head.scale / temperature)
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grad_logprobs[:, None] * jacobian).to(jacobian.dtype), None, None, None
