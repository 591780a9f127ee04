"""Drawing completions: the `Sampler` protocol, and the native engine that implements it on the policy's own forward.

A prompt is prefilled once, its n completions share its keys and values, and finished rows leave the batch. Every row
has its own stream of uniform numbers, so what it draws does not depend on its neighbours. The distribution is never
filtered (top-k, top-p): the log-probabilities returned are those of what was sampled from, and of what is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rl_lora.attention import Decode, Packed, Prefix
from rl_lora.policy import Policy
from rl_lora.types import Stop


@dataclass(frozen=True)
class Request:
    """n completions of one prompt under one adapter (or the bare base, where that is None).

    `temperature` 0 is greedy decoding; its log-probabilities are those of temperature 1.
    `seed` fixes the uniform numbers of the n rows, whatever else is in the batch.
    """

    prompt_ids: tuple[int, ...]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    adapter: str | None = None
    seed: int | tuple[int, ...] = 0


@dataclass(frozen=True)
class Completion:
    """token_ids: with the stop token, if one was drawn. logprobs: of each, under the distribution it was drawn from."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Stop


class Sampler(Protocol):
    """Whatever turns requests into completions: the native engine here, a server elsewhere."""

    def generate(
        self, requests: Sequence[Request], on_token: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        """The n completions of each request, in order. `on_token` is told how many tokens were drawn, as they are."""
        ...


class NativeSampler:
    """Samples from the policy itself: it reads the adapters that the learner writes, nothing is synchronised.

    Args:
        max_rows: completions that are decoded at a time; memory grows with it.
    """

    def __init__(self, policy: Policy, max_rows: int = 256):
        if max_rows < 1:
            raise ValueError(f"max_rows must be >= 1, got {max_rows}")
        self.policy, self.max_rows = policy, max_rows

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_token: Callable[[int], None] | None = None
    ) -> list[list[Completion]]:
        for request in requests:
            self._check(request)
        results: list[list[Completion]] = [[] for _ in requests]
        # Neighbours carry the same adapter, and prompts of one batch have similar lengths.
        order = sorted(range(len(requests)), key=lambda i: (requests[i].adapter or "", len(requests[i].prompt_ids)))
        rows = [_Row(i, requests[i], k) for i in order for k in range(requests[i].n)]
        batches: Iterable[list[_Row]] = [rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows)]
        if self.policy.not_shared:  # without our own mask, rows of a batch need prompts of one length
            batches = [
                list(batch)
                for chunk in batches
                for _, batch in itertools.groupby(chunk, key=lambda row: len(row.request.prompt_ids))
            ]
        for batch in batches:
            self._run(batch, on_token)
        for row in rows:
            results[row.index].append(row.completion())
        return results

    def _check(self, request: Request) -> None:
        if not request.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {request.temperature}")
        if request.max_tokens < 1 or request.n < 1 or not request.prompt_ids:
            raise ValueError(
                f"a request needs a prompt, n >= 1 and max_tokens >= 1; got {len(request.prompt_ids)} prompt tokens, "
                f"n={request.n}, max_tokens={request.max_tokens}"
            )
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.policy.context_length:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens and a completion of up to {request.max_tokens} do not "
                f"fit the model's context of {self.policy.context_length}; shorten the prompt or lower max_tokens"
            )

    def _run(self, rows: list[_Row], on_token: Callable[[int], None] | None) -> None:
        device = self.policy.device
        stop_ids = torch.tensor(sorted(self.policy.chat.stop_ids), dtype=torch.int64, device=device)
        max_tokens = max(row.request.max_tokens for row in rows)
        uniforms = torch.tensor(np.array([row.uniforms(max_tokens) for row in rows]), device=device)  # (R, T)
        temperature = torch.tensor([row.request.temperature for row in rows], device=device)
        limit = torch.tensor([row.request.max_tokens for row in rows], device=device)
        tokens = torch.zeros(len(rows), max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(rows), max_tokens, device=device)
        n_tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

        decoder = (_PlainDecoder if self.policy.not_shared else _SharedPrefixDecoder)(self.policy, rows, max_tokens)
        alive = torch.arange(len(rows), device=device)  # the rows that are in the batch, finished or not
        running = torch.ones(len(rows), dtype=torch.bool, device=device)  # of those, the unfinished
        n_running = len(rows)
        hidden = decoder.prefill()
        for t in range(max_tokens):
            drawn, logprob = sample(self.policy.head.logits(hidden), temperature[alive], uniforms[alive, t])
            tokens[alive, t], logprobs[alive, t] = drawn, logprob
            n_tokens[alive] += running
            stopped = torch.isin(drawn, stop_ids)
            ended[alive] |= running & stopped
            running &= ~stopped & (limit[alive] > t + 1)
            if on_token is not None:
                on_token(n_running)
            n_running = int(running.sum())
            if n_running == 0:
                break
            if n_running <= 0.8 * len(alive):  # moving keys and values costs about as much as a step saves
                keep = torch.where(running)[0]
                decoder.keep(keep)
                alive, drawn, running = alive[keep], drawn[keep], running[keep]
            hidden = decoder.step(drawn)
        if not torch.isfinite(logprobs).all():
            bad = rows[int((~torch.isfinite(logprobs)).any(1).nonzero()[0])].request
            raise FloatingPointError(
                f"the model gives no finite probabilities under adapter {bad.adapter!r}; it has diverged, or its "
                "weights do not fit the dtype"
            )
        for i, row in enumerate(rows):
            n = int(n_tokens[i])
            row.token_ids, row.logprobs = tokens[i, :n].tolist(), logprobs[i, :n].tolist()
            row.stop = Stop.END if ended[i] else Stop.LENGTH


class _Row:
    """One completion in the making."""

    def __init__(self, index: int, request: Request, k: int):
        self.index, self.request, self.k = index, request, k
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.stop = Stop.LENGTH

    def uniforms(self, n: int) -> np.ndarray:
        seed = self.request.seed if isinstance(self.request.seed, tuple) else (self.request.seed,)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, self.k)))).random(
            n, dtype=np.float32
        )

    def completion(self) -> Completion:
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.stop)


class _SharedPrefixDecoder:
    """Prompts prefilled once; each row's own keys and values behind them."""

    def __init__(self, policy: Policy, rows: list[_Row], max_tokens: int):
        self.policy, self.max_tokens = policy, max_tokens
        prompts: dict[tuple[tuple[int, ...], str | None], int] = {}
        self.prompt = [prompts.setdefault((row.request.prompt_ids, row.request.adapter), len(prompts)) for row in rows]
        self.prompts = list(prompts)
        self.adapters = [row.request.adapter for row in rows]

    def prefill(self) -> Tensor:
        """Hidden state behind each row's prompt, (R, d)."""
        device = self.policy.device
        lengths = torch.tensor([len(ids) for ids, _ in self.prompts], device=device)
        tokens = torch.zeros(len(self.prompts), int(lengths.max()), dtype=torch.int64)
        for i, (ids, _) in enumerate(self.prompts):
            tokens[i, : len(ids)] = torch.tensor(ids)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        segments = torch.where(positions < lengths[:, None], 0, -1)
        prefix = Prefix()
        adapters = [adapter for _, adapter in self.prompts]
        hidden = self.policy.hidden(tokens.to(device), adapters, Packed(positions, segments), positions, prefix)
        prompt = torch.tensor(self.prompt, device=device)
        self.decode = Decode(prefix, lengths, prompt, self.max_tokens)
        return hidden[torch.arange(len(lengths), device=device), lengths - 1][prompt]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, (R,); hidden states, (R, d)."""
        hidden = self.policy.hidden(tokens[:, None], self.adapters, self.decode, self.decode.positions, self.decode)
        self.decode.advance()
        return hidden[:, 0]

    def keep(self, rows: Tensor) -> None:
        self.decode.keep(rows)
        self.adapters = [self.adapters[i] for i in rows.tolist()]


class _PlainDecoder:
    """The model's own attention and cache, for architectures that ours does not cover. Prompts have one length."""

    def __init__(self, policy: Policy, rows: list[_Row], max_tokens: int):
        self.policy = policy
        self.prompts = torch.tensor([row.request.prompt_ids for row in rows], device=policy.device)
        self.adapters = [row.request.adapter for row in rows]
        self.rows = torch.arange(len(rows), device=policy.device)
        self.blank = torch.zeros(len(rows), dtype=torch.int64, device=policy.device)
        self.cache = policy.cache()

    def prefill(self) -> Tensor:
        return self.policy.hidden(self.prompts, self.adapters, cache=self.cache)[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        # Finished rows stay: not every cache can give rows up.
        current = self.blank.scatter(0, self.rows, tokens)
        return self.policy.hidden(current[:, None], self.adapters, cache=self.cache)[self.rows, -1]

    def keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]


def sample(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF, in two levels: first a block of the vocabulary, then a token in it.

    logits: float32 (R, V); temperature: (R,), 0 for greedy; uniforms: (R,) in [0, 1).
    Returns tokens int64 (R,), and their log-probabilities float32 (R,).
    """
    greedy = temperature == 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    logprobs = torch.log_softmax(logits, -1)
    p = torch.exp(logprobs)
    R, V = p.shape
    n = 1 << (V.bit_length() // 2)  # tokens of a block
    blocks = torch.nn.functional.pad(p, (0, -V % n)).view(R, -1, n)
    mass = blocks.sum(-1).cumsum(-1)  # (R, V / n)
    target = _below(uniforms * mass[:, -1], mass[:, -1])[:, None]
    # The first block whose cumulative mass exceeds the target; NaN has none, and is found out by its log-probability.
    block = torch.searchsorted(mass, target, right=True).clamp_max(mass.shape[1] - 1)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1)  # (R, n)
    rest = target - torch.where(block > 0, mass.gather(1, (block - 1).clamp_min(0)), 0)
    token = block * n + torch.searchsorted(inside, _below(rest, inside[:, -1:]), right=True)
    token = torch.where(greedy, logits.argmax(-1), token[:, 0].clamp_max(V - 1))
    return token, logprobs.gather(1, token[:, None])[:, 0]


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """x, or the next number under the limit: rounding must not choose a token without probability."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
