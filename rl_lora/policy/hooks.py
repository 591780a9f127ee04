"""The layers of a model, and other forwards in the place of theirs for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Forward = Callable[..., Any]


def layers_of(backbone: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of the model, from the lowest; none where transformers does not mark them as such."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def forwards(layers: Sequence[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Inside, the forward of each layer is a wrapped one."""
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
