"""JSON as every reader takes it: what Python would write as NaN or Infinity, which is no JSON, is null."""

from __future__ import annotations

import json
import math
from typing import Any

loads = json.loads
JSONDecodeError, JSONDecoder = json.JSONDecodeError, json.JSONDecoder


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The same data, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
