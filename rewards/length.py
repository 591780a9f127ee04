"""Length: short completions are worth more. Counts characters; a reward knows no tokens."""

from __future__ import annotations

from typing import Any


def length_reward(completion: str, reference: Any = None, *, target: int = 200, limit: int = 1000) -> float:
    """1.0 up to `target` characters, falling linearly to 0.0 at `limit` characters and beyond.

    Raises:
        ValueError: unless 0 <= target < limit.
    """
    if not 0 <= target < limit:
        raise ValueError(f"length needs 0 <= target < limit (characters), got target {target} and limit {limit}")
    return min(1.0, max(0.0, (limit - len(completion)) / (limit - target)))
