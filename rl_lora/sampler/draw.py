"""Sampling one token a row, by inversion of the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lora.kernels import vocabulary_softmax
from rl_lora.policy.head import Head, rows_of_a_block

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Logits that exist at a time."""


class InverseCDF:
    """Samples from the distributions over next tokens that hidden states stand for.

    Its working memory stays from call to call: a CPU pays more for fresh pages of the size of the logits than for the
    arithmetic on them.
    """

    def __init__(self, head: Head):
        self.head = head
        V, device = len(head.weight), head.weight.device
        self.rows = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // V)
        self.block = min(self.rows, rows_of_a_block(V, device))
        self.in_one_pass = vocabulary_softmax.supports(head.weight.dtype, device)
        self._logits = head.weight.new_empty(0, V, dtype=head.weight.dtype if self.in_one_pass else torch.float32)
        self._p = head.weight.new_empty(0 if self.in_one_pass else self.block, V, dtype=torch.float32)

    def __call__(self, hidden: Tensor, temperature: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: (R, d); the rest, and what is returned, as in `sample`."""
        if len(self._logits) < min(self.rows, len(hidden)):
            self._logits = self._logits.new_empty(min(self.rows, len(hidden)), self._logits.shape[1])
        draw = self._in_one_pass if self.in_one_pass else self._in_blocks
        parts = []
        for start in range(0, len(hidden), self.rows):
            chunk = slice(start, min(start + self.rows, len(hidden)))
            given = None if temperature is None else temperature[chunk]
            parts.append(draw(hidden[chunk], given, uniforms[chunk]))
        if len(parts) == 1:
            return parts[0]
        tokens, logprobs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _in_one_pass(self, hidden: Tensor, temperature: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.head.project_in_parts(hidden, self._logits[: len(hidden)])
        return vocabulary_softmax.draw(projected, temperature, uniforms, self.head.scale, self.head.softcap)

    def _in_blocks(self, hidden: Tensor, temperature: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logits, parts = self.head.logits(hidden, out=self._logits[: len(hidden)]), []
        for start in range(0, len(hidden), self.block):
            block = slice(start, min(start + self.block, len(hidden)))
            given = None if temperature is None else temperature[block]
            parts.append(sample(logits[block], given, uniforms[block], out=self._p[: block.stop - start]))
        tokens, logprobs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)


def sample(
    logits: Tensor, temperature: Tensor | None, uniforms: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token a row, in two levels: first a block of the vocabulary, then a token in it. In torch; on a CPU,
    `vocabulary_softmax.draw` does the same where it can be compiled.

    logits: float32 (R, V); temperature: (R,), 0 for greedy, or None where all are 1; uniforms: (R,) in [0, 1);
    out: room for the probabilities. Returns tokens int64 (R,), and their log-probabilities float32 (R,).
    """
    if temperature is not None:
        logits = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
    p = torch.softmax(logits, -1, out=out)
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
