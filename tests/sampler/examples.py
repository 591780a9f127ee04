"""Prompts and requests of the tests of samplers, and what their completions are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl_lora.sampler.protocol import Completion, Request
from tests.tiny import token_ids

LETTERS = [chr(c) for c in range(ord("A"), ord("z"), 2) if chr(c).isalpha()]
"""Extra stop tokens: about a tenth of the vocabulary, so that rows of random models end at different times."""


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(token_ids(1, length, seed)[0].tolist())


def mixed_requests(temperature: float) -> list[Request]:
    """Prompts of 1 to 21 tokens, one of them twice and under every adapter, in no order; limits of 1 to 14 tokens."""
    base = Request(prompt(9), n=3, max_tokens=14, temperature=temperature)
    return [
        replace(base, adapter="b", seed=1),
        replace(base, prompt_ids=prompt(21, 1), adapter="a", n=2, seed=2),
        replace(base, prompt_ids=prompt(1, 2), n=1, seed=3),
        replace(base, adapter="a", seed=4),
        replace(base, prompt_ids=prompt(9, 5), adapter="a", n=2, max_tokens=1, seed=5),
        replace(base, adapter="a", n=2, max_tokens=9, seed=6),
        replace(base, seed=(7, 1)),
    ]


def tokens(completions: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in row] for row in completions]


def fits(drawn: Tensor, p: Tensor) -> bool:
    """Pearson's chi-squared test at one in 10^5 (Wilson and Hilferty's cube-root approximation)."""
    assert not drawn.numel() or p[drawn].min() > 0
    p, drawn = p[p > 0], (p > 0).cumsum(0)[drawn] - 1
    expected = p * len(drawn)
    statistic = float(((torch.bincount(drawn, minlength=len(p)) - expected) ** 2 / expected).sum())
    df = len(p) - 1
    return statistic < df * (1 - 2 / (9 * df) + 4.265 * math.sqrt(2 / (9 * df))) ** 3


def tokens_and_logprobs(replies: list[list[Completion]]) -> tuple[list[tuple[int, ...]], list[float]]:
    flat = [completion for row in replies for completion in row]
    return [c.token_ids for c in flat], [p for c in flat for p in c.logprobs]


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    (tokens, logprobs), (expected_tokens, expected_logprobs) = map(tokens_and_logprobs, (found, expected))
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
