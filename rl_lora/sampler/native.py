"""The native sampler: completions sampled with the policy's own forward.

A prompt is prefilled once for all its completions, and a prefix that prompts share once for all of them. Finished rows
make room for waiting ones, and a conversation goes on in its row. Every row has its own stream of uniform numbers, so
its tokens do not depend on its neighbours. The distribution is never filtered (top-k, top-p): the log-probabilities
returned are those of the distribution that is sampled from, and that is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled import CompiledLayers
from rl_lora.sampler.cuda_graph import StepRecorder
from rl_lora.sampler.protocol import Completion, Follow, Later, Request
from rl_lora.sampler.rows import Job, Next
from rl_lora.sampler.scheduler import ContinuousScheduler, StaticScheduler
from rl_lora.system.memory import budget


class NativeSampler:
    """The engine that samples from the policy itself: it reads the adapters that the learner writes, without a copy.

    Args:
        max_rows: completions that are decoded at a time.
        max_cache_gib: of the keys and values of those rows and their prompts; fewer rows are decoded where they would
            not fit, but always one request. By default half of the memory that is free when `generate` is called.
            Counted when a request comes in: later turns may outgrow it. Models that cannot share prompts are bound by
            `max_rows` alone.
        check_every: tokens between looks at which rows have finished: by default 8 on a GPU, which each look makes
            wait, else 1. Models that cannot share prompts are looked at after each token.
        compiled: layers that decode steps run in place of the policy's; None: the policy's.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 256,
        *,
        max_cache_gib: float | None = None,
        check_every: int | None = None,
        compiled: CompiledLayers | None = None,
    ):
        if check_every is None:
            check_every = 8 if policy.device.type == "cuda" else 1
        for name, value in (("max_rows", max_rows), ("check_every", check_every)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.policy, self.max_rows, self.max_cache_gib = policy, max_rows, max_cache_gib
        self.check_every = 1 if policy.not_shared else check_every
        self.compiled = compiled
        self.recorder = StepRecorder.for_device(policy.device)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        on_token: Callable[[int], None] | None = None,
        follow: Follow | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        for request in requests:
            self._check(request)
        # Neighbours carry the same adapter, and prompts of one batch have similar lengths.
        order = sorted(range(len(requests)), key=lambda i: (requests[i].adapter or "", len(requests[i].prompt_ids)))
        jobs = [Job(requests[i], [(i, k) for k in range(requests[i].n)], requests[i].first) for i in order]
        results: dict[tuple[int, int], Completion] = {}

        def finish(job: Job, place: int, completion: Completion) -> Next:
            i, k = job.of[place]
            results[i, k] = completion
            answer = None if follow is None else follow(i, k, completion)

            def following() -> Job | None:
                request = answer.request() if isinstance(answer, Later) else answer
                if request is None:
                    return None
                self._check(request)
                if request.n != 1:
                    raise ValueError(f"what follows one completion is one completion, got a request of n={request.n}")
                return Job(request, [(i, k)])

            return Next(following, answer.done, answer.wait) if isinstance(answer, Later) else Next(following)

        scheduler: ContinuousScheduler | StaticScheduler
        on_token = on_token or (lambda n: None)
        if self.policy.not_shared:
            scheduler = StaticScheduler(self.policy, jobs, finish, on_token, max_rows=self.max_rows)
        else:
            scheduler = ContinuousScheduler(
                self.policy,
                jobs,
                finish,
                on_token,
                max_rows=self.max_rows,
                max_bytes=budget(self.max_cache_gib, self.policy.device),
                check_every=self.check_every,
                compiled=self.compiled,
                recorder=self.recorder,
            )
        scheduler.run()
        return [[results[i, k] for k in range(request.n)] for i, request in enumerate(requests)]

    def weights_changed(self, adapter: str | None, version: int) -> None:
        """See `Sampler`. There is nothing to copy: the adapter in the policy's bank is the one that the learner steps,
        which its version proves. Weights of the base may not change: decode steps read packed copies of them."""
        if adapter is None:
            raise ValueError("the weights of the base have changed, and the native sampler has copies of the old ones")
        found = self.policy.bank[adapter].version
        if found != version:
            raise ValueError(
                f"the sampler reads version {found} of adapter {adapter!r}, but its weights are of version {version}; "
                "sample and learn with one and the same policy"
            )

    def _check(self, request: Request) -> None:
        """Raises ValueError for a request that cannot be served."""
        if not request.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {request.temperature}")
        if request.max_tokens < 1 or request.n < 1 or not request.prompt_ids:
            raise ValueError(
                f"a request needs a prompt, n >= 1 and max_tokens >= 1; got {len(request.prompt_ids)} prompt tokens, "
                f"n={request.n}, max_tokens={request.max_tokens}"
            )
        V = len(self.policy.head.weight)
        if wrong := [i for i in request.stop_ids or () if not 0 <= i < V]:
            raise ValueError(f"stop_ids must be tokens of the model, from 0 to {V - 1}; got {min(wrong)}")
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.policy.context_length:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens and a completion of up to {request.max_tokens} do not "
                f"fit the model's context of {self.policy.context_length}; shorten the prompt or lower max_tokens"
            )
