"""The interface of samplers: requests in, completions out. The package's own engine is `native.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rl_lora.types import Stop


@dataclass(frozen=True)
class Request:
    """n completions of one prompt under one adapter."""

    prompt_ids: tuple[int, ...]
    """Token ids, one at least."""
    n: int = 1
    """Completions of the prompt."""
    max_tokens: int = 16
    """Limit of each completion. Prompt and limit together fit the model's context."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding, whose log-probabilities are those of temperature 1."""
    adapter: str | None = None
    """The name of an adapter in the policy's bank; None: the bare base."""
    seed: int | tuple[int, ...] = 0
    """Fixes the uniform random numbers of the n completions, whatever else is in the batch."""
    first: int = 0
    """Number of the first completion among those of the seed: two requests of n, the second with first=n, give the
    completions of one request of 2 n."""
    stop_ids: frozenset[int] | None = None
    """Token ids that end a completion; None: those of the policy's chat. The empty set: only `max_tokens` ends it."""


@dataclass(frozen=True)
class Completion:
    """One reply to a request."""

    token_ids: tuple[int, ...]
    """One at least; the last one is the stop token, where one was sampled."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the probability of each token under the distribution that it was sampled from."""
    stop: Stop
    """END after a stop token, else LENGTH."""


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
"""Called with i, k and completion k of request i as soon as it ends. May answer with the next request, of n = 1, such
as the next turn of a conversation; its completion comes under the same i and k."""


class Sampler(Protocol):
    """Whatever turns requests into completions: the native engine here, a server elsewhere.

    `make_sampler` (`factory.py`) chooses one. Whoever changes the weights of an adapter calls `weights_changed` before
    the next `generate`.
    """

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

        `on_token` is told how many tokens were sampled, as they are.

        Raises:
            ValueError: a request cannot be served: it does not fit the context, for example.
            FloatingPointError: the model gives no finite probabilities.
        """
        ...

    def weights_changed(self, adapter: str | None, version: int) -> None:
        """The weights of an adapter, or those of the base (None), have changed; `version` counts their optimizer steps.

        When this returns, every later completion under the adapter is sampled from that version.

        Raises:
            ValueError: the sampler cannot provide that version.
        """
        ...
