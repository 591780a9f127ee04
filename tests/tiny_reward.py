"""A reward that a random model can climb; named as `tests.tiny_reward:ascii_share`, as a user's own would be."""

from __future__ import annotations

import random
from typing import Any

from rewards import Score


def ascii_share(completion: str, reference: Any = None) -> Score:
    """The share of ASCII characters, in quarters, so that some groups of a step have no signal. Solved: all of them."""
    share = sum(char.isascii() for char in completion) / max(1, len(completion))
    return Score(int(4 * share) / 4, {"short": float(len(completion) < 4)}, share == 1.0)


def noise(completion: str, reference: object) -> float:
    """Python's global generator: what code of a user's may well draw from."""
    return random.random()
