"""The names of the default model: the one that users type, and those of the two models that it may stand for."""

from __future__ import annotations

DEFAULT_MODEL = "smollm2-135m"
EMBEDDED_MODEL = "smollm2-135m-q4"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def canonical(name: str) -> str:
    """A base as it is compared: the default name, where it is written down, is from a time when it meant the embedded
    model."""
    return EMBEDDED_MODEL if name == DEFAULT_MODEL else name


def public_name(name: str) -> str:
    """What other people's tools can load: the hub's id in place of the name of a model that only we know."""
    return HUB_MODEL if canonical(name) == EMBEDDED_MODEL else name
