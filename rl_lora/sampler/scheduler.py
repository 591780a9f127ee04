"""Which rows are decoded together: requests wait, are admitted, and their rows leave.

`ContinuousScheduler` keeps the batch full; `StaticScheduler` does for models that cannot share prompts.
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
"""Share of the rows that must stand still before next turns, or other prompts in their place, are read in."""
LEAVING = {"cpu": 0.05, "cuda": 0.2}
"""Share of the rows that must be done with before the others close up: on a CPU that costs less than what a step
computes for them in vain; a GPU has to record its steps anew."""
PREFILL_TOKENS = 4096
"""Prompt tokens that are read in at a time."""


class ContinuousScheduler:
    """One call of `generate`: rows come, sample, and leave.

    Each round samples `check_every` tokens a row and then looks which rows have finished. Their completions are handed
    over, and either the row has another turn or it is done with; it stands still while that is not known. When enough
    rows stand still, they are moved out, and new prompts and next turns are read in.
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
        self.asked: dict[Row, Next] = {}
        """Rows of which it is not known yet what comes next."""
        self.turns: dict[Row, Job] = {}
        """Next turns that wait to be read in, by the row that they go on in."""
        self.state = SamplingState(self.policy)
        self.decode = DecodeCache(self.policy.device)
        self.prefixes: list[Prefix] = []
        self.recorded = RecordedStep(recorder, partial(self.decode.advance_device, -1))

    def run(self) -> None:
        self._read_prefixes()
        while self.rows or self.waiting:
            self._arrive()
            if self._stands():
                next(iter(self.asked.values())).wait()
                self._hear()
                self._compact(self.state.n)
                continue
            running = torch.tensor([not row.finished for row in self.rows], device=self.policy.device)
            n_before = int(self.state.n.sum())
            for i in range(self.check_every):
                sampled, running = self.state.sample(running)
                if i + 1 < self.check_every:
                    self._step(sampled)
            self._retire(running.tolist())
            self.on_token(int(self.state.n.sum()) - n_before)
            sampled = self._compact(sampled)
            if not all(row.finished for row in self.rows):
                self._step(sampled)
            self._settle()

    def _step(self, tokens: Tensor) -> None:
        """Read one token a row, (R,)."""
        self.decode.make_room()
        self.state.hidden = self.recorded(self._read, tokens, self.decode.arrangement)
        self.decode.advance_host()

    def _read(self, tokens: Tensor) -> Tensor:
        """The device's part of a step: (R,) -> (R, d)."""
        positions = self.decode.begin().clamp_max(self.policy.context_length - 1)  # rows that stand still run past it
        adapters = [row.adapter for row in self.rows]
        with nullcontext() if self.compiled is None else self.compiled.stepping(self.decode, adapters):
            hidden = self.policy.hidden(tokens[:, None], adapters, self.decode, positions, self.decode)
        self.decode.advance_device()
        return hidden[:, 0]

    def _retire(self, running: Sequence[bool]) -> None:
        """Hand over the completions that have ended."""
        for place, (row, runs) in enumerate(zip(self.rows, running, strict=True)):
            if runs or row.finished:
                continue
            row.finished = True
            completion = self.state.completion(place, row)
            row.ids = row.ids + completion.token_ids
            self.asked[row] = self.finish(row.job, row.place, completion)
        self._hear()

    def _hear(self) -> None:
        """What comes next of the rows of which it is known by now."""
        for row in [row for row, following in self.asked.items() if following.done()]:
            if (job := self.asked.pop(row).job()) is not None:
                ids = job.request.prompt_ids
                if job.request.adapter == row.adapter and len(ids) > len(row.ids) and ids[: len(row.ids)] == row.ids:
                    self.turns[row] = job
                else:
                    self.waiting.append(job)

    def _stands(self) -> bool:
        """Whether nothing can be sampled before it is known what comes next."""
        return bool(self.asked) and all(row.finished for row in self.rows)

    def _idle(self) -> bool:
        """Whether enough rows stand still for others to take their place, apart from those that cannot go on yet."""
        still = sum(row.finished for row in self.rows) - len(self.asked)
        n = len(self.rows) - len(self.asked)
        return still == n or still >= TURNOVER * n

    def _compact(self, sampled: Tensor) -> Tensor:
        """Move out rows that are done with; the tokens sampled by those that stay."""
        keep = [i for i, row in enumerate(self.rows) if not row.finished or row in self.turns or row in self.asked]
        least = LEAVING.get(sampled.device.type, LEAVING["cuda"])
        if len(self.rows) - len(keep) < max(1, least * len(self.rows)):
            return sampled
        self.rows = [self.rows[i] for i in keep]
        self.decode.keep(np.array(keep, np.int64))
        index = torch.tensor(keep, dtype=torch.int64, device=sampled.device)
        self.state.keep(index)
        return sampled[index]

    def _settle(self) -> None:
        """Rows that stand still have not read the tokens that they were given to keep the batch whole."""
        for place, row in enumerate(self.rows):
            if row.finished:
                self.decode.set_back(place, len(row.ids) - row.base - 1)

    def _arrive(self) -> None:
        """Read in next turns and new prompts, where rows stand still or are missing."""
        if self.turns and self._idle():
            self._take_turns()
        free = self.max_rows - len(self.rows)
        if self.waiting and (not self.rows or free >= TURNOVER * self.max_rows):
            jobs: list[Job] = []
            while self.waiting and len(self.waiting[0].of) <= free and self._fits([*jobs, self.waiting[0]]):
                jobs.append(self.waiting.popleft())
                free -= len(jobs[-1].of)
            if jobs:
                self._admit(jobs)

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether these can come in beside what is there; a first one always can."""
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

    def _read_prefixes(self) -> None:
        """Prefill what prompts of the same adapter begin with in common."""
        self.prefixes = find_shared_prefixes((job.request.adapter, job.request.prompt_ids) for job in self.waiting)
        if self.prefixes:
            self.decode.prefixes, _ = self._prefill(self.prefixes, [0] * len(self.prefixes))
            self.decode.prefixes.append_empty()  # for prompts that begin otherwise

    def _take_turns(self) -> None:
        """Read in what is new in the next turns of conversations: the last token sampled, and what came in reply."""
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
    """The same for architectures that our attention does not cover: the model's own attention and cache.

    Without our own mask, rows of a batch need prompts of one length, and nobody comes in before all have left.
    """

    def __init__(
        self, policy: Policy, jobs: Sequence[Job], finish: Finish, on_token: Callable[[int], None], *, max_rows: int
    ):
        self.policy, self.max_rows, self.finish, self.on_token = policy, max_rows, finish, on_token
        self.waiting = list(jobs)

    def run(self) -> None:
        while self.waiting:
            jobs = sorted(self.waiting, key=lambda job: len(job.request.prompt_ids))
            asked: list[Next] = []
            for _, alike in itertools.groupby(jobs, key=lambda job: len(job.request.prompt_ids)):
                rows = [Row(job, place) for job in alike for place in range(len(job.of))]
                for i in range(0, len(rows), self.max_rows):
                    asked += self._batch(rows[i : i + self.max_rows])
            self.waiting = [job for following in asked if (job := following.job()) is not None]

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
