"""A reward that a random model can climb; named as `tests.tiny_reward:ascii_share`, as a user's own would be."""

from __future__ import annotations

import random
import time
from typing import Any

from rl_lora.rewards import Score


def ascii_share(completion: str, reference: Any = None) -> Score:
    """The share of ASCII characters, in quarters, so that some groups of a step have no signal. Solved: all of them."""
    share = sum(char.isascii() for char in completion) / max(1, len(completion))
    return Score(int(4 * share) / 4, {"short": float(len(completion) < 4)}, share == 1.0)


def slow_ascii_share(completion: str, reference: Any = None) -> Score:
    """So that a run can be met while it is going on."""
    time.sleep(0.02)
    return ascii_share(completion)


def noise(completion: str, reference: object) -> float:
    """Python's global generator: what code of a user's may well draw from."""
    return random.random()


FAILS_AFTER: int | None = None
"""Calls of `voting` before it fails."""


def voting(completion: str, reference: Any = None) -> Score:
    """Solved where the first character is an even byte; the answer is that byte modulo 5, so that some are votes for
    the same. Of an empty text there is none."""
    global FAILS_AFTER
    if FAILS_AFTER is not None:
        FAILS_AFTER -= 1
        if FAILS_AFTER < 0:
            raise RuntimeError("no more")
    if not completion:
        return Score(0.0, success=False)
    return Score(0.5, {"long": float(len(completion) > 2)}, ord(completion[0]) % 2 == 0, str(ord(completion[0]) % 5))


def keyed(completion: str, reference: Any) -> float:
    """The commonest slip there is."""
    answers: dict[str, float] = {}
    return answers["answer"]


RAISES = 'return answers["answer"]'


def slow(completion: str, reference: Any) -> float:
    """As slow as a judge behind a network."""
    time.sleep(0.4)
    return 1.0


class Late(BaseException):
    """As the time-outs of some libraries are."""


def late(completion: str, reference: Any) -> float:
    raise Late("too late")


def exits(completion: str, reference: Any) -> float:
    raise SystemExit(0)
