"""The micro-batch: what packing makes of groups, and the learner computes in one forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl_lora.attention.tree import SpanTree


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the tokens of one forward pass, and what is learned at which of them.

    tokens: int64 (B, L). With a `tree`, one row of L tokens without padding, in which each prompt stands once and its
    completions behind it. Without, B sequences padded on the right, for models that cannot share prompts.
    The next fields are flat, over the N positions whose next token the model wrote:
    index: int64 (N,), into the flattened B * L positions: where the hidden state that predicts a target stands.
    targets: int64 (N,). behaviour_logprobs, advantages, weights: float32 (N,).
    `weights` sum to at most one over all micro-batches of a step and an adapter: the denominator is global.
    adapters: the adapter of each token of a tree (L), or of each row (B).
    n_tokens: tokens that have to be computed, padding apart.
    """

    tokens: Tensor
    tree: SpanTree | None
    index: Tensor
    targets: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    adapters: tuple[str | None, ...]
    n_tokens: int
