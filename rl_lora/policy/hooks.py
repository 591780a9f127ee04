"""The layers of a model, and wrapped forwards in the place of theirs for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Forward = Callable[..., Any]


def layers_of(backbone: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of the model, from the lowest; none where transformers does not mark them as such."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def forwards(layers: Sequence[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Inside, each layer runs `wrap(layer, forward)` in place of its forward."""
    before = [layer.__dict__.get("forward") for layer in layers]  # another library may have put its own there
    for layer in layers:
        layer.forward = wrap(layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextmanager
def recomputing(layers: Sequence[nn.Module], setting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, these layers keep their inputs only. The backward pass, later, computes them again inside `setting()`."""

    def again(_: nn.Module, forward: Forward) -> Forward:
        return partial(
            checkpoint,
            forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random: the model is in evaluation mode
            context_fn=lambda: (nullcontext(), setting()),
        )

    with forwards(layers, again):
        yield
