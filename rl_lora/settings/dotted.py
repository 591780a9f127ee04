"""Settings by their dotted names, and their values as a user types them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of a (nested) config dataclass."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def as_typed(value: Any) -> str:
    """A value as a user types it, in an option or in YAML: null, true, {name: 'text'}."""
    if isinstance(value, str):
        return value
    return _inside(value)


def _inside(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inside(name)}: {_inside(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inside, value)) + "]"
    return repr(value)
