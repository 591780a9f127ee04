"""Time for memory: layers whose activations are not kept for the backward pass but computed again in it.

As few layers as a budget asks for, the lowest ones: when the backward pass comes to them, all others have been freed.
The values are the same to the bit, and so is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rl_lora.attention.tree import SpanTree
from rl_lora.policy.hooks import Forward, forwards, layers_of
from rl_lora.policy.policy import Policy

PROBE_TOKENS = 16


class Recompute:
    """Chooses the layers of a policy that are computed twice.

    Args:
        max_bytes: of the activations that the layers of one forward pass keep. Models whose layers are not known to
            transformers as such (`GradientCheckpointingLayer`) keep all, whatever it says.
    """

    def __init__(self, policy: Policy, max_bytes: float):
        self.policy, self.max_bytes = policy, max_bytes
        self._bytes_per_token: list[float] | None = None

    def layers(self, n_tokens: int, adapter: str | None) -> list[nn.Module]:
        """Those to recompute in a pass over so many tokens."""
        if self._bytes_per_token is None:
            self._bytes_per_token = activation_bytes(self.policy, adapter)
        d = self.policy.head.weight.shape[1] * self.policy.head.weight.element_size()  # a layer's input is kept
        kept = sum(self._bytes_per_token) * n_tokens
        chosen: list[nn.Module] = []
        for layer, n_bytes in zip(layers_of(self.policy.backbone), self._bytes_per_token, strict=True):
            if kept <= self.max_bytes:
                break
            if n_bytes > d:  # below the lowest adapter nothing is kept anyway
                chosen.append(layer)
                kept -= (n_bytes - d) * n_tokens
        return chosen


def activation_bytes(policy: Policy, adapter: str | None) -> list[float]:
    """What each layer keeps for the backward pass, in bytes a token: seen in two short passes."""
    n = min(PROBE_TOKENS, policy.context_length // 2)
    short, long = (_kept(policy, adapter, n_tokens) for n_tokens in (n, 2 * n))
    return [(b - a) / n for a, b in zip(short, long, strict=True)]


def _kept(policy: Policy, adapter: str | None, n_tokens: int) -> list[int]:
    layers = layers_of(policy.backbone)
    place: dict[nn.Module, int] = {layer: i for i, layer in enumerate(layers)}
    kept = [0] * len(layers)
    # Weights are there anyway; storages that several operations keep count once.
    own = () if adapter is None else (policy.bank[adapter].flat,)
    weights = (*policy.model.parameters(), *policy.model.buffers(), *own)
    seen = {weight.untyped_storage().data_ptr() for weight in weights}
    alive: list[Tensor] = []  # a freed storage's address would be taken for one that was seen

    def watched(layer: nn.Module, forward: Forward) -> Forward:
        def count(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                alive.append(x)
                kept[place[layer]] += storage.nbytes()
            return x

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                return forward(*args, **kwargs)

        return run

    tree = SpanTree([(0, n_tokens, -1)], policy.device) if policy.not_shared is None else None
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=policy.device)
    adapters = [adapter] * (1 if tree is None else n_tokens)
    with torch.enable_grad(), forwards(layers, watched):
        policy.hidden(tokens, adapters, tree, None if tree is None else tree.positions)
    return kept
