"""Log-probabilities of given tokens from hidden states, without the matrix of logits ever existing.

The gradient of log p(y) with respect to the hidden state, J = (W[y] - p W) / T, does not depend on what the loss will
be. So the forward pass, which has p of a chunk at hand, stores J (N, d) and the backward pass is one multiplication:
nothing of size N x V is kept, and no logit is computed twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_lora.kernels import vocabulary_softmax
from rl_lora.kernels.frozen_linear import FrozenLinear

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at a time in the compute dtype: enough rows for an efficient product."""
BLOCK_ELEMENTS = 1 << 21
"""Of these, as many are in float32 at a time on a CPU: 8 MiB, which it keeps in its cache."""
PART = 8192
"""Tokens of the vocabulary that a CPU computes the logits of at a time: few enough to stay in its cache."""


SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite, MiniCPM3; HyperCLOVA X multiplies by it
    "logits_mup_width_multiplier": -1,  # Inkling
}
"""Names in a config for what logits are multiplied by, or divided."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Of Gemma and many others; RecurrentGemma; xLSTM."""


def rows_of_a_block(V: int, device: torch.device) -> int:
    """How many rows of float32 logits to work on at a time: a GPU would wait for small pieces."""
    return max(1, (BLOCK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS) // V)


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model: logits = cap(scale * (W h + b))."""

    weight: Tensor
    """(V, d)"""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    copies: int = 0
    """See `FrozenLinear`."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, copies: int = 0) -> Head:
        """Read off the model's output embeddings and config: its scales (`SCALES`), its soft cap (`CAPS`), and how many
        tokens it has logits of. Whether that is all, `head_check.py` finds out."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no linear output head; only causal language models can be trained"
            )
        config = model.config.get_text_config()
        scale = 1.0
        for name, power in SCALES.items():
            inverse = power < 0 and not config.model_type.startswith("hyperclovax")
            scale *= (getattr(config, name, None) or 1.0) ** (-1 if inverse else 1)
        softcap = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
        n = getattr(config, "unpadded_vocab_size", None) or len(linear.weight)
        return cls(linear.weight[:n], None if linear.bias is None else linear.bias[:n], scale, softcap, copies)

    @functools.cached_property
    def parts(self) -> list[tuple[slice, FrozenLinear]]:
        """W h + b, in pieces of the vocabulary where the device is a CPU."""
        V = len(self.weight)
        n = PART if self.weight.device.type == "cpu" else V
        parts = [slice(i, min(i + n, V)) for i in range(0, V, n)]
        return [
            (part, FrozenLinear(self.weight[part], None if self.bias is None else self.bias[part], self.copies))
            for part in parts
        ]

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """(N, d) -> (N, V) in the compute dtype, written to `out`: W h + b, all but `finish`."""
        if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and self.copies:
            for part, linear in self.parts:
                linear(hidden, out=out[:, part])
            return out
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def finish(self, projected: Tensor, out: Tensor) -> Tensor:
        """Logits, float32 (..., V), written to `out`, from what `project` gave."""
        return self.scaled(out.copy_(projected))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(..., d) -> float32 (..., V), in `out` where that is given."""
        if out is None:
            out = hidden.new_empty(*hidden.shape[:-1], len(self.weight), dtype=torch.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        self.project_in_parts(rows, out.view(len(rows), -1))
        return self.scaled(out)

    def project_in_parts(self, hidden: Tensor, out: Tensor) -> Tensor:
        """What `project` computes, (N, d) -> (N, V), for few rows and without gradients; `out` may be of any dtype."""
        for part, linear in self.parts:
            linear(hidden, out=out[:, part])
        return out

    def scaled(self, logits: Tensor) -> Tensor:
        """cap(scale * logits), in place."""
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its distribution, in nats, at the given temperature.

        hidden: (N, d); targets: int64 (N,). Returns float32 (N,), (N,); only the first carries a gradient.
        """
        return _TokenLogprobs.apply(hidden, targets, self, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        N, V = len(targets), len(head.weight)
        logprobs, entropy = hidden.new_empty(N, dtype=torch.float32), hidden.new_empty(N, dtype=torch.float32)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, d)
        chunk = min(N, max(1, CHUNK_ELEMENTS // V))
        products = hidden.new_empty(chunk, V)  # logits in the compute dtype, then their gradients
        ours = vocabulary_softmax.supports(hidden.dtype, hidden.device)
        for start in range(0, N, chunk):
            of_chunk, part = products[: N - start], slice(start, start + chunk)
            head.project(hidden[part], out=of_chunk)
            if ours:
                logprobs[part], entropy[part] = vocabulary_softmax.token_logprobs(
                    of_chunk, targets[part], temperature, head.scale, head.softcap, gradient=jacobian is not None
                )
            else:
                logprobs[part], entropy[part] = _logprobs_in_blocks(
                    of_chunk, targets[part], temperature, head, gradient=jacobian is not None
                )
            if jacobian is not None:
                of_chunk_J = jacobian[part]
                torch.mm(of_chunk, head.weight, out=of_chunk_J)
                of_chunk_J *= head.scale / temperature
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grad_logprobs[:, None] * jacobian).to(jacobian.dtype), None, None, None


def _logprobs_in_blocks(
    projected: Tensor, targets: Tensor, temperature: float, head: Head, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """What `vocabulary_softmax.token_logprobs` computes, in torch: a few rows at a time are in float32."""
    N, V = projected.shape
    logprobs, entropy = projected.new_empty(2, N, dtype=torch.float32)
    block = min(N, rows_of_a_block(V, projected.device))
    logits_of_block, p_of_block = projected.new_empty(2, block, V, dtype=torch.float32)
    for start in range(0, N, block):
        part = slice(start, min(start + block, N))
        y = targets[part, None]
        logits = head.finish(projected[part], out=logits_of_block[: len(y)])
        p = p_of_block[: len(y)]
        uncapped_slope = None if head.softcap is None else 1 - (logits / head.softcap) ** 2
        logits /= temperature
        torch.softmax(logits, -1, out=p)
        log_z = logits.amax(-1) - p.amax(-1).log()
        logprobs[part] = logits.gather(1, y)[:, 0] - log_z
        entropy[part] = log_z - logits.mul_(p).sum(-1)
        if gradient:
            p.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))  # d log p(y) / d logits, times T
            if uncapped_slope is not None:
                p *= uncapped_slope
            projected[part] = p
    return logprobs, entropy
