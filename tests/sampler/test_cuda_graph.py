"""Recorded decode steps: what replays them samples what the steps sample, or is not used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_lora.kernels.native_code import dispatched
from rl_lora.sampler.cuda_graph import Step, StepRecorder
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Request
from tests.oracles import tiny_policy
from tests.sampler.examples import LETTERS, mixed_requests, prompt
from tests.tiny import ARCHITECTURES

FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.lift_fresh.default,  # a tensor made of numbers of the host
}


def record_operations(step: Step, tokens: Tensor) -> Step:
    """What a CUDA graph does, on a CPU: the step's operations are taken down with the memory that they read and write,
    and done again; no line of Python in between, and no number that the host would have to wait for."""
    given = tokens.clone()
    tape: list[tuple[Any, Any, Any, Any]] = []

    class Tape(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op in FORBIDDEN:
                raise RuntimeError(f"{op} makes the host wait")
            result = op(*args, **(kwargs or {}))
            tape.append((op, args, kwargs or {}, result))
            return result

    with dispatched(), Tape():
        hidden = step(given)
    step.__self__.decode.advance_device(-1)  # type: ignore[attr-defined]  # a capture does nothing

    def replay(tokens: Tensor) -> Tensor:
        given.copy_(tokens)
        for op, args, kwargs, before in tape:
            for old, new in zip(tree_leaves(before), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return hidden

    return replay


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("check_every", [1, 5])
def test_recorded_steps_draw_what_steps_draw(arch: str, check_every: int) -> None:
    """With rows that come, go, stand still, and go on with another turn."""
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    requests = [replace(r, max_tokens=r.max_tokens * 5) for r in mixed_requests(0.8)]
    sampler = NativeSampler(policy, 9, check_every=check_every)

    def generate() -> list[list[Completion]]:
        second: set[tuple[int, int]] = set()

        def follow(i: int, k: int, completion: Completion) -> Request | None:
            if (i, k) in second or i % 2:
                return None
            second.add((i, k))
            ids = requests[i].prompt_ids + completion.token_ids + prompt(1 + i, seed=k)
            return replace(requests[i], prompt_ids=ids, n=1, max_tokens=30, seed=(i, k))

        return sampler.generate(requests, follow=follow)

    expected = generate()
    n_recorded = n_replayed = 0

    def record(step: Step, tokens: Tensor) -> Step:
        nonlocal n_recorded
        n_recorded += 1
        replay = record_operations(step, tokens)

        def counted(tokens: Tensor) -> Tensor:
            nonlocal n_replayed
            n_replayed += 1
            return replay(tokens)

        return counted

    sampler.recorder = StepRecorder(record)
    if policy.bank.active_experts > 1 or arch == "gpt2":  # asks how many tokens an expert gets; looks for padding
        with pytest.warns(UserWarning, match="without recorded steps"):
            assert generate() == expected
        assert n_recorded == 1
    else:
        assert generate() == expected
        assert sampler.recorder.fast_path.verified
        assert n_replayed > n_recorded > 2, "steps of several arrangements are meant to be replayed"


def test_a_recording_that_computes_something_else_is_not_used() -> None:
    policy = tiny_policy("llama", ["a"])
    sampler = NativeSampler(policy)
    requests = [Request(prompt(9), n=3, max_tokens=14, adapter="a")]
    expected = sampler.generate(requests)
    sampler.recorder = StepRecorder(lambda step, tokens: lambda tokens: step(tokens) * 1.1)
    with pytest.warns(UserWarning, match="hidden states of a recorded step differ"):
        assert sampler.generate(requests) == expected
