"""Which rows are decoded together changes nothing that is sampled, and rows come and leave as they should."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from torch import Tensor

from rl_lora.attention.kv_cache import DecodeCache
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Later, Request
from tests.oracles import tiny_policy
from tests.sampler.examples import LETTERS, assert_same, prompt


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", [{"max_rows": 5}, {"max_rows": 4, "check_every": 3}, {"max_cache_gib": 6e-5}])
def test_who_waits_for_whom_changes_nothing_that_is_drawn(arch: str, options: dict[str, Any]) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    head = prompt(20)  # what all begin with
    requests = [
        Request((*head, *prompt(n, seed=n)), n=3, max_tokens=3 + 2 * n, adapter=adapter, seed=n)
        for n, adapter in ((1, "a"), (5, "a"), (2, "b"), (3, "b"), (4, None), (6, "a"))
    ]
    requests.append(Request(prompt(4, seed=99), n=2, max_tokens=9, seed=7))  # begins otherwise
    expected = [NativeSampler(policy).generate([request])[0] for request in requests]
    assert len({len(completion.token_ids) for row in expected for completion in row}) > 2
    assert_same(NativeSampler(policy, **options).generate(requests), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "plain"])
@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"check_every": 4}])
def test_a_conversation_that_goes_on_draws_what_a_fresh_prompt_of_it_would(arch: str, options: dict[str, Any]) -> None:
    policy = tiny_policy("llama" if arch == "plain" else arch, stop_tokens=LETTERS)
    policy.not_shared = "for the test" if arch == "plain" else None
    asked: dict[tuple[int, int], list[tuple[Request, Completion]]] = {}
    requests = [Request(prompt(6 + i, seed=i), n=2, max_tokens=4, adapter=None, seed=i) for i in range(3)]

    def follow(i: int, k: int, completion: Completion) -> Request | None:
        turns = asked.setdefault((i, k), [])
        before = following.get((i, k), requests[i])
        turns.append((before, completion))
        if len(turns) == 3 - k:
            return None
        ids = before.prompt_ids + completion.token_ids + prompt(1 + 2 * i, seed=10 * i + k)
        if len(turns) == 2 and i == 1:
            ids = ids[3:]  # forgets how it began: a prompt like any other
        following[i, k] = Request(ids, max_tokens=5, seed=(i, k, len(turns)))
        return following[i, k]

    following: dict[tuple[int, int], Request] = {}
    last = NativeSampler(policy, **options).generate(requests, follow=follow)
    for (i, k), turns in asked.items():
        assert len(turns) == 3 - k
        assert last[i][k] == turns[-1][1]
        for turn, (request, completion) in enumerate(turns):
            fresh = NativeSampler(policy).generate([request])[0]
            assert_same([[completion]], [[fresh[k if turn == 0 else 0]]])


@pytest.mark.parametrize(("shared", "check_every"), [(True, 1), (True, 3), (False, 1)])
def test_a_row_that_waits_for_its_next_turn_holds_up_no_other(shared: bool, check_every: int) -> None:
    """While one answer is out, the others play all their turns; then it is waited for, once."""
    requests = [Request(prompt(i), max_tokens=3, seed=i) for i in range(3, 7)]
    out, turns = Future[None](), [0] * 4
    seen = []

    def follow(i: int, k: int, completion: Completion) -> Request | Later | None:
        turns[i] += 1
        if turns[i] == 3:
            return None
        answer = Request((*prompt(9), *range(3, 5 + turns[i])), max_tokens=3, seed=i)
        return answer if i or turns[i] > 1 else Later(out.done, lambda: answer, wait)

    def wait() -> None:
        seen.append(list(turns))
        out.set_result(None)

    policy = tiny_policy()
    policy.not_shared = None if shared else "for the test"
    NativeSampler(policy, check_every=check_every).generate(requests, follow=follow)
    assert turns == [3] * 4
    assert seen == ([[1, 3, 3, 3]] if shared else [])


def test_what_follows_one_completion_is_one_completion() -> None:
    with pytest.raises(ValueError, match="one completion, got a request of n=2"):
        NativeSampler(tiny_policy()).generate([Request(prompt(3))], follow=lambda *_: Request(prompt(9), n=2))


def test_nothing_of_a_rollout_outlives_it() -> None:
    """Without the help of the garbage collector: keys and values may be half of the memory."""
    sampler = NativeSampler(tiny_policy("llama", ["a"]))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            sampler.generate([Request(prompt(9), n=3, max_tokens=14, adapter="a")])
        assert not [x for x in gc.get_objects() if isinstance(x, DecodeCache)]
    finally:
        gc.enable()


def test_few_rows_are_computed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, rows that have ended leave before they are a twentieth of the batch."""
    policy = tiny_policy("llama", ["a"])
    policy.chat.stop_ids = frozenset()
    computed: list[int] = []
    hidden = policy.hidden

    def watched(tokens: Tensor, adapters: Sequence[str | None], layout: Any = None, *rest: Any, **more: Any) -> Tensor:
        if isinstance(layout, DecodeCache):
            computed.append(len(tokens))
        return hidden(tokens, adapters, layout, *rest, **more)

    monkeypatch.setattr(policy, "hidden", watched)
    limits = range(1, 61)
    NativeSampler(policy).generate([Request(prompt(9), max_tokens=n, adapter="a") for n in limits])
    running = [sum(n > step for n in limits) for step in range(1, max(limits))]
    assert len(computed) == len(running)
    for rows, needed in zip(computed, running, strict=True):
        assert needed <= rows < needed + max(1, 0.05 * rows)
    assert any(rows > needed for rows, needed in zip(computed, running, strict=True)), "moving has a price too"
