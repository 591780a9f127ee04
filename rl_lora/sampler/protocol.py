"""What a sampler is: whatever turns requests into completions. The engine of our own is `native_sampler.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rl_lora.types import Stop


@dataclass(frozen=True)
class Request:
    """n completions of one prompt under one adapter (or the bare base, where that is None).

    `temperature` 0 is greedy decoding; its log-probabilities are those of temperature 1.
    `seed` fixes the uniform numbers of the n rows, whatever else is in the batch. `first`: the rows are number first,
    first + 1, ... of that seed: two requests of n draw what one of 2 n does.
    """

    prompt_ids: tuple[int, ...]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    adapter: str | None = None
    seed: int | tuple[int, ...] = 0
    first: int = 0


@dataclass(frozen=True)
class Completion:
    """token_ids: with the stop token, if one was drawn. logprobs: of each, under the distribution it was drawn from."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Stop


@dataclass(frozen=True)
class Later:
    """An answer that takes a while. It is asked for when all completions that ended in the same step have been told.

    `done`: whether `request` answers at once; until then, others are decoded. `request`: the answer, waited for if need
    be. `wait`: returns as soon as one of the answers that are still out is done; called where nothing can be decoded.
    """

    done: Callable[[], bool]
    request: Callable[[], Request | None]
    wait: Callable[[], None]


Follow = Callable[[int, int, Completion], Request | Later | None]
"""Told completion k of request i as soon as it ends; may answer with what is asked for next, n = 1, such as the next
turn of a conversation. Its completion comes under the same i and k."""


class Sampler(Protocol):
    """Whatever turns requests into completions: the native engine here, a server elsewhere."""

    @property
    def check_every(self) -> int:
        """Tokens of a row that one call of `on_token` counts, at most."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        on_token: Callable[[int], None] | None = None,
        follow: Follow | None = None,
    ) -> list[list[Completion]]:
        """The n completions of each request, in order; the last ones, where `follow` asked for more.

        `on_token` is told how many tokens were drawn, as they are.
        """
        ...
