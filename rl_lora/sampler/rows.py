"""The rows of the batch that is decoded: the request of each, its uniform random numbers, and its tokens so far.

Which rows there are, and what they read, is the business of `scheduler.py`; sampling one token, of `draw.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from rl_lora.policy.policy import Policy
from rl_lora.sampler.draw import InverseCDF
from rl_lora.sampler.protocol import Completion, Request
from rl_lora.types import Stop

SAMPLING_NAME = "rl_lora::sampling"
"""Name of the sampling of tokens in a profile, the head's product included."""


@dataclass
class Job:
    """A request that waits for room. `of`: for each of its completions, (request, k) as the caller counts."""

    request: Request
    of: list[tuple[int, int]]
    first: int = 0
    """Completions of the same seed that are sampled elsewhere: the uniforms go on behind theirs."""

    def split(self, n: int) -> list[Job]:
        """Jobs of at most n completions."""
        return [Job(self.request, self.of[i : i + n], self.first + i) for i in range(0, len(self.of), n)]


@dataclass(frozen=True)
class Next:
    """What comes after a completion: see `protocol.Later`."""

    job: Callable[[], Job | None]
    done: Callable[[], bool] = lambda: True
    wait: Callable[[], None] = lambda: None


Finish = Callable[[Job, int, Completion], Next]
"""Hands over completion number `place` of a job; what comes next is asked once all are handed over."""


class Row:
    """A row of the batch: completion number `place` of a job, and the conversation that it goes on from."""

    def __init__(self, job: Job, place: int):
        self.job, self.place = job, place
        self.adapter = job.request.adapter
        self.ids = job.request.prompt_ids
        """Tokens that the row has keys and values of, and the last one that was sampled."""
        self.base = len(self.ids)
        """How many of them were its first prompt."""
        self.finished = False

    @property
    def request(self) -> Request:
        return self.job.request

    def uniforms(self) -> np.ndarray:
        """One uniform random number for each token, float32 (max_tokens,), from the seed alone."""
        seed = self.request.seed if isinstance(self.request.seed, tuple) else (self.request.seed,)
        sequence = np.random.SeedSequence((*seed, self.job.first + self.place))
        return np.random.Generator(np.random.Philox(sequence)).random(self.request.max_tokens, dtype=np.float32)


OF_ROWS = ("temperature", "limit", "n", "stop_set", "uniforms", "tokens", "logprobs")
"""Tensors of `SamplingState` that are set when a row starts."""


class SamplingState:
    """What R rows need to sample their next tokens, and what they have sampled: device tensors of R entries."""

    def __init__(self, policy: Policy):
        self.policy, device = policy, policy.device
        self.sample_from = InverseCDF(policy.head)
        self.hidden = torch.empty(0, policy.head.weight.shape[1], dtype=policy.dtype, device=device)
        self.temperature = torch.empty(0, device=device)
        self.limit, self.n, self.stop_set = torch.empty(3, 0, dtype=torch.int64, device=device)
        self.is_stop = torch.empty(0, len(policy.head.weight), dtype=torch.bool, device=device)  # (sets, V)
        self.stop_sets: dict[frozenset[int], int] = {}
        self.uniforms = torch.empty(0, 0, device=device)  # (R, T)
        self.tokens = torch.empty(0, 1, dtype=torch.int64, device=device)  # (R, T + 1); the last column takes anything
        self.logprobs = torch.empty(0, 1, device=device)
        self.plain = True  # every temperature is 1

    def admit(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """New rows, and the hidden states (R', d) that their first tokens are sampled from."""
        self._widen(rows)
        R = len(self.n)
        self.hidden = torch.cat([self.hidden, hidden])
        for name in OF_ROWS:
            x = getattr(self, name)
            setattr(self, name, torch.cat([x, x.new_zeros(len(rows), *x.shape[1:])]))
        self._start(range(R, R + len(rows)), rows)

    def restart(self, places: Sequence[int], rows: Sequence[Row], hidden: Tensor) -> None:
        """Rows at these places go on with a new request."""
        self._widen(rows)
        self.hidden[torch.tensor(places, device=hidden.device)] = hidden
        self._start(places, rows)

    def _start(self, places: Sequence[int], rows: Sequence[Row]) -> None:
        T = self.uniforms.shape[1]
        device = self.n.device
        at = torch.tensor(places, device=device)
        self.temperature[at] = torch.tensor([float(row.request.temperature) for row in rows], device=device)
        self.plain = self.plain and all(row.request.temperature == 1 for row in rows)
        self.limit[at] = torch.tensor([row.request.max_tokens for row in rows], device=device)
        self.n[at] = 0
        self.stop_set[at] = torch.tensor([self._stop_set(row) for row in rows], device=device)
        uniforms = np.zeros((len(rows), T), np.float32)
        for i, row in enumerate(rows):
            uniforms[i, : row.request.max_tokens] = row.uniforms()
        self.uniforms[at] = torch.from_numpy(uniforms).to(device)

    def _stop_ids(self, row: Row) -> frozenset[int]:
        return self.policy.chat.stop_ids if row.request.stop_ids is None else row.request.stop_ids

    def _stop_set(self, row: Row) -> int:
        """The row of `is_stop` that says which tokens end this row's completion."""
        ids = self._stop_ids(row)
        if ids not in self.stop_sets:
            self.stop_sets[ids] = len(self.stop_sets)
            is_stop = self.is_stop.new_zeros(1, self.is_stop.shape[1])
            is_stop[0, [i for i in ids if i < is_stop.shape[1]]] = True  # a tokenizer may know more than the head
            self.is_stop = torch.cat([self.is_stop, is_stop])
        return self.stop_sets[ids]

    def _widen(self, rows: Sequence[Row]) -> None:
        """Make room for the tokens of new requests."""
        if (more := max(row.request.max_tokens for row in rows) - self.uniforms.shape[1]) > 0:
            for name in ("uniforms", "tokens", "logprobs"):
                setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, more)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, int64 (R',)."""
        for name in ("hidden", *OF_ROWS):
            setattr(self, name, getattr(self, name)[rows])

    def sample(self, running: Tensor) -> tuple[Tensor, Tensor]:
        """Sample one token for each row, int64 (R,), and keep it where `running`, bool (R,).

        Returns the tokens, and which rows run on.
        """
        T = self.uniforms.shape[1]
        at = torch.where(running, self.n, T)[:, None]
        uniforms = self.uniforms.gather(1, at.clamp_max(T - 1))[:, 0]
        with record_function(SAMPLING_NAME):
            sampled, logprob = self.sample_from(self.hidden, None if self.plain else self.temperature, uniforms)
        self.tokens.scatter_(1, at, sampled[:, None])
        self.logprobs.scatter_(1, at, logprob[:, None])
        self.n += running
        return sampled, running & ~self.is_stop[self.stop_set, sampled] & (self.n < self.limit)

    def completion(self, place: int, row: Row) -> Completion:
        """The tokens of the row at a place. Raises FloatingPointError if the model gave no finite probabilities."""
        n = int(self.n[place])
        tokens, logprobs = self.tokens[place, :n].tolist(), self.logprobs[place, :n].tolist()
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(
                f"the model gives no finite probabilities under adapter {row.adapter!r}; it has diverged, or its "
                "weights do not fit the dtype"
            )
        stop = Stop.END if tokens[-1] in self._stop_ids(row) else Stop.LENGTH
        return Completion(tuple(tokens), tuple(logprobs), stop)
