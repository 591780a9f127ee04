"""The schedulers of the native sampler: which rows are decoded together, when they come in and when they leave.

`ContinuousScheduler` fills the places of finished rows while others are decoded. `StaticScheduler` is for models that
cannot share prompts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rl_lora.attention.kv_cache import DecodeCache, KeyValues
from rl_lora.attention.prefixes import Prefix, find_shared_prefixes, prefix_of
from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled import CompiledLayers
from rl_lora.sampler.cuda_graph import RecordedStep, StepRecorder
from rl_lora.sampler.rows import Finish, Job, Next, Row, SamplingState

TURNOVER = 0.2
"""Share of the rows that must have finished before next turns, or other prompts in their place, are prefilled."""
LEAVING = {"cpu": 0.05, "cuda": 0.2}
"""Share of the rows that must have finished for good before they are removed. On a CPU removing them soon costs less
than computing them in vain; a GPU has to record its decode steps anew."""
PREFILL_TOKENS = 4096
"""Prompt tokens of one prefill, at most."""


class ContinuousScheduler:
    """One call of `generate`, by continuous batching.

    Each round samples `check_every` tokens a row and then looks which rows have finished. Their completions are handed
    over. A finished row stays in the batch while its next turn is unknown or waits. When enough rows have finished,
    those without a next turn are removed, and new prompts and next turns are prefilled.

    Args:
        finish: called with each completion; answers with what comes next.
        max_bytes: of keys and values.
        compiled, recorder: see `NativeSampler`.
    """

    def __init__(
        self,
        policy: Policy,
        jobs: Sequence[Job],
        finish: Finish,
        on_token: Callable[[int], None],
        *,
        max_rows: int,
        max_bytes: float,
        check_every: int,
        compiled: CompiledLayers | None,
        recorder: StepRecorder,
    ):
        self.policy, self.finish, self.on_token = policy, finish, on_token
        self.max_rows, self.max_bytes, self.check_every, self.compiled = max_rows, max_bytes, check_every, compiled
        self.waiting = deque(part for job in jobs for part in job.split(self.max_rows))
        self.rows: list[Row] = []
        self.unanswered: dict[Row, Next] = {}
        """Finished rows whose next turn, if there is one, is not known yet."""
        self.turns: dict[Row, Job] = {}
        """Next turns that wait for their prefill, by the row that they go on in."""
        self.state = SamplingState(self.policy)
        self.decode = DecodeCache(self.policy.device)
        self.prefixes: list[Prefix] = []
        self.recorded = RecordedStep(recorder, partial(self.decode.advance_device, -1))

    def run(self) -> None:
        self._prefill_shared()
        while self.rows or self.waiting:
            self._fill()
            if self._is_blocked():
                next(iter(self.unanswered.values())).wait()
                self._collect_answers()
                self._compact(self.state.n)
                continue
            running = torch.tensor([not row.finished for row in self.rows], device=self.policy.device)
            n_before = int(self.state.n.sum())
            for i in range(self.check_every):
                sampled, running = self.state.sample(running)
                if i + 1 < self.check_every:
                    self._decode_step(sampled)
            self._hand_over(running.tolist())
            self.on_token(int(self.state.n.sum()) - n_before)
            sampled = self._compact(sampled)
            if not all(row.finished for row in self.rows):
                self._decode_step(sampled)
            self._forget_padding()

    def _decode_step(self, tokens: Tensor) -> None:
        """Decode one token of each row, int64 (R,), and keep the hidden states that its next one is sampled from."""
        self.decode.make_room()
        self.state.hidden = self.recorded(self._forward, tokens, self.decode.arrangement)
        self.decode.advance_host()

    def _forward(self, tokens: Tensor) -> Tensor:
        """The device's part of a step: (R,) -> (R, d)."""
        positions = self.decode.begin().clamp_max(self.policy.context_length - 1)  # finished rows run past it
        adapters = [row.adapter for row in self.rows]
        with nullcontext() if self.compiled is None else self.compiled.stepping(self.decode, adapters):
            hidden = self.policy.hidden(tokens[:, None], adapters, self.decode, positions, self.decode)
        self.decode.advance_device()
        return hidden[:, 0]

    def _hand_over(self, running: Sequence[bool]) -> None:
        """Hand over the completions that have ended: those of rows that are not `running` any more."""
        for place, (row, runs) in enumerate(zip(self.rows, running, strict=True)):
            if runs or row.finished:
                continue
            row.finished = True
            completion = self.state.completion(place, row)
            row.ids = row.ids + completion.token_ids
            self.unanswered[row] = self.finish(row.job, row.place, completion)
        self._collect_answers()

    def _collect_answers(self) -> None:
        """Take the next turns that are known by now."""
        for row in [row for row, following in self.unanswered.items() if following.done()]:
            if (job := self.unanswered.pop(row).job()) is not None:
                ids = job.request.prompt_ids
                if job.request.adapter == row.adapter and len(ids) > len(row.ids) and ids[: len(row.ids)] == row.ids:
                    self.turns[row] = job
                else:
                    self.waiting.append(job)

    def _is_blocked(self) -> bool:
        """Whether no row can go on before a next turn is known."""
        return bool(self.unanswered) and all(row.finished for row in self.rows)

    def _turnover_is_due(self) -> bool:
        """Whether enough rows have finished for others to take their places, apart from rows without an answer."""
        finished = sum(row.finished for row in self.rows) - len(self.unanswered)
        n = len(self.rows) - len(self.unanswered)
        return finished == n or finished >= TURNOVER * n

    def _compact(self, sampled: Tensor) -> Tensor:
        """Remove rows that have finished for good; returns the tokens of the others."""
        keep = [i for i, row in enumerate(self.rows) if not row.finished or row in self.turns or row in self.unanswered]
        least = LEAVING.get(sampled.device.type, LEAVING["cuda"])
        if len(self.rows) - len(keep) < max(1, least * len(self.rows)):
            return sampled
        self.rows = [self.rows[i] for i in keep]
        self.decode.keep(np.array(keep, np.int64))
        index = torch.tensor(keep, dtype=torch.int64, device=sampled.device)
        self.state.keep(index)
        return sampled[index]

    def _forget_padding(self) -> None:
        """Take back the tokens that finished rows were given to keep the batch whole."""
        for place, row in enumerate(self.rows):
            if row.finished:
                self.decode.set_back(place, len(row.ids) - row.base - 1)

    def _fill(self) -> None:
        """Prefill next turns and new prompts, where there are finished rows and free places."""
        if self.turns and self._turnover_is_due():
            self._start_turns()
        free = self.max_rows - len(self.rows)
        if self.waiting and (not self.rows or free >= TURNOVER * self.max_rows):
            jobs: list[Job] = []
            while self.waiting and len(self.waiting[0].of) <= free and self._fits([*jobs, self.waiting[0]]):
                jobs.append(self.waiting.popleft())
                free -= len(jobs[-1].of)
            if jobs:
                self._admit(jobs)

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the keys and values of these fit beside those that are there; a first one always does."""
        if len(jobs) == 1 and not self.rows:
            return True
        rows = len(self.rows) + sum(len(job.of) for job in jobs)
        room = max(self.decode.room, *(job.request.max_tokens for job in jobs))
        prompts = sum(len(job.request.prompt_ids) for job in jobs)
        if self.decode.prompts is not None:
            prompts += int(self.decode.prompts.lengths.sum())
        return self.policy.cache_bytes_per_token * (rows * room + prompts) <= self.max_bytes

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Prefill the jobs' prompts, each once, and start their rows."""
        prompts: dict[Prefix, int] = {}
        rows, prompt_of_row = [], []
        for job in jobs:
            for place in range(len(job.of)):
                rows.append(Row(job, place))
                key = job.request.adapter, job.request.prompt_ids
                prompt_of_row.append(prompts.setdefault(key, len(prompts)))
        found = [prefix_of(self.prefixes, *key) for key in prompts]
        prefix = [len(self.prefixes) if t is None else t for t in found]
        nodes, hidden = self._prefill(list(prompts), prefix)
        self.decode.admit(nodes, np.array(prefix), np.array(prompt_of_row))
        self.rows += rows
        self.state.admit(rows, hidden[torch.tensor(prompt_of_row, device=hidden.device)])

    def _prefill(self, prompts: Sequence[Prefix], prefix: Sequence[int]) -> tuple[KeyValues, Tensor]:
        """Keys and values of prompts behind their prefixes, and the hidden states of their last tokens, (P, d)."""
        nodes, hiddens = None, []
        for part in _parts([len(ids) for _, ids in prompts], PREFILL_TOKENS):
            new, hidden = self.policy.prefill(prompts[part], self.decode.prefixes, prefix[part])
            hiddens.append(hidden)
            if nodes is None:
                nodes = new
            else:
                nodes.append(new)
        assert nodes is not None
        return nodes, torch.cat(hiddens)

    def _prefill_shared(self) -> None:
        """Prefill the prefixes that prompts of an adapter share."""
        self.prefixes = find_shared_prefixes((job.request.adapter, job.request.prompt_ids) for job in self.waiting)
        if self.prefixes:
            self.decode.prefixes, _ = self._prefill(self.prefixes, [0] * len(self.prefixes))
            self.decode.prefixes.append_empty()  # for prompts that begin otherwise

    def _start_turns(self) -> None:
        """Prefill the new tokens of next turns: the last one sampled, and the reply of the environment."""
        places = [place for place, row in enumerate(self.rows) if row in self.turns]
        rows = [self.rows[place] for place in places]
        new = []
        for row in rows:
            job = self.turns.pop(row)
            new.append(job.request.prompt_ids[len(row.ids) - 1 :])
            row.job, row.place, row.ids, row.finished = job, 0, job.request.prompt_ids, False
        lengths = np.array([len(ids) for ids in new])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, ids in enumerate(new):
            tokens[i, : len(ids)] = torch.tensor(ids)
        at = np.array(places)
        positions = self.decode.begin(tokens.shape[1], at).clamp_max(self.policy.context_length - 1)
        adapters = [row.adapter for row in rows]
        hidden = self.policy.hidden(tokens.to(self.policy.device), adapters, self.decode, positions, self.decode)
        self.decode.advance(lengths, at)
        self.decode.arrangement += 1  # what is kept of adapters (`AdapterBank.stack`) was that of these rows
        last = torch.from_numpy(lengths - 1).to(hidden.device)
        self.state.restart(places, rows, hidden[torch.arange(len(rows), device=hidden.device), last])


def _parts(lengths: Sequence[int], budget: int) -> list[slice]:
    """Neighbours whose lengths add up to the budget at most; a longer one is alone."""
    parts, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > budget:
            parts.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*parts, slice(start, len(lengths))]


class StaticScheduler:
    """The same by static batching, for architectures that need their own attention and cache.

    Their masks allow prompts of one length in a batch, and no row comes in before all have left.
    """

    def __init__(
        self, policy: Policy, jobs: Sequence[Job], finish: Finish, on_token: Callable[[int], None], *, max_rows: int
    ):
        self.policy, self.max_rows, self.finish, self.on_token = policy, max_rows, finish, on_token
        self.waiting = list(jobs)

    def run(self) -> None:
        while self.waiting:
            jobs = sorted(self.waiting, key=lambda job: len(job.request.prompt_ids))
            unanswered: list[Next] = []
            for _, alike in itertools.groupby(jobs, key=lambda job: len(job.request.prompt_ids)):
                rows = [Row(job, place) for job in alike for place in range(len(job.of))]
                for i in range(0, len(rows), self.max_rows):
                    unanswered += self._batch(rows[i : i + self.max_rows])
            self.waiting = [job for following in unanswered if (job := following.job()) is not None]

    def _batch(self, rows: Sequence[Row]) -> list[Next]:
        """Sample completions of prompts of one length, and hand them over."""
        policy, adapters = self.policy, [row.adapter for row in rows]
        cache = policy.cache()
        prompts = torch.tensor([row.request.prompt_ids for row in rows], device=policy.device)
        hidden = policy.hidden(prompts, adapters, cache=cache)[:, -1]
        state = SamplingState(policy)
        state.admit(rows, hidden)
        running = torch.ones(len(rows), dtype=torch.bool, device=policy.device)
        n_running = len(rows)
        while n_running:
            self.on_token(n_running)
            sampled, running = state.sample(running)
            if n_running := int(running.sum()):  # finished rows stay: not every cache can give rows up
                state.hidden = policy.hidden(sampled[:, None], adapters, cache=cache)[:, -1]
        return [self.finish(row.job, row.place, state.completion(place, row)) for place, row in enumerate(rows)]
