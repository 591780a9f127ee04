"""Sampling: the tokens that `generate` of transformers chooses, from the distribution that the learner computes.

Rows are independent: of their neighbours, of the size of the batch, of whether prompts are shared.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_lora.attention.kv_cache import DecodeCache
from rl_lora.kernels.native_code import dispatched
from rl_lora.learner.learner import target_logprobs
from rl_lora.learner.packing import pack
from rl_lora.policy import head as head_module
from rl_lora.policy.head import Head
from rl_lora.policy.policy import Policy
from rl_lora.sampler.cuda_graph import Step, StepRecorder
from rl_lora.sampler.draw import InverseCDF, sample
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Later, Request
from rl_lora.types import Stop
from tests.oracles import Oracle, as_turn, episode, group, tiny_policy
from tests.tiny import ARCHITECTURES, EOS_ID, PAD_ID, VOCAB_SIZE, token_ids

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


def greedy_by_transformers(policy: Policy, request: Request) -> tuple[int, ...]:
    generate: Any = policy.model.generate
    with policy.bank.route([request.adapter]):
        ids = generate(
            torch.tensor([request.prompt_ids]),
            do_sample=False,
            max_new_tokens=request.max_tokens,
            eos_token_id=sorted(policy.chat.stop_ids),
            pad_token_id=PAD_ID,
        )
    return tuple(ids[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_completions_are_those_of_transformers(arch: str) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    requests = mixed_requests(0.0) + [
        Request(prompt(length, 10 + length), max_tokens=14, temperature=0, adapter=adapter)
        for length, adapter in zip((3, 5, 8, 9, 12, 17), itertools.cycle(["a", None, "b"]), strict=False)
    ]
    expected = [greedy_by_transformers(policy, request) for request in requests]
    found = tokens(NativeSampler(policy).generate(requests))
    assert found == [[ids] * request.n for ids, request in zip(expected, requests, strict=True)]
    assert len({len(ids) for ids in expected}) >= 3, "rows are meant to end at different times"
    assert len({expected[0], expected[3], expected[6]}) == 3, "adapters are meant to matter"


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6, 0.0])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_are_those_of_the_model_at_that_temperature(arch: str, temperature: float) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    oracle = Oracle(policy, arch)
    requests = mixed_requests(temperature)
    for request, completions in zip(requests, NativeSampler(policy).generate(requests), strict=True):
        for completion in completions[:2]:
            with torch.no_grad():
                exact = oracle.logprobs(as_turn(request, completion), request.adapter, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sampler_and_learner_agree(arch: str, shared: bool) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    policy.not_shared = None if shared else "for the test"
    requests = [request for request in mixed_requests(0.8) if request.adapter]
    drawn = NativeSampler(policy).generate(requests)
    signal = [
        (group(*(episode(as_turn(r, c)) for c in completions), adapter=r.adapter), torch.ones(r.n).numpy())
        for r, completions in zip(requests, drawn, strict=True)
    ]
    batches = pack(signal, denominators={"a": 1.0, "b": 1.0}, tokens_per_microbatch=120, shared_prefix=shared)
    for batch in batches:
        with torch.no_grad():
            logprobs, _ = target_logprobs(policy, batch, temperature=0.8)
        assert (logprobs - batch.behaviour_logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unshared_prompts_give_the_same_completions(arch: str) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    requests = mixed_requests(1.0)
    shared = NativeSampler(policy).generate(requests)
    policy.not_shared = "for the test"
    plain = NativeSampler(policy).generate(requests)
    assert tokens(plain) == tokens(shared)
    for ours, theirs in zip(itertools.chain(*plain), itertools.chain(*shared), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.stop is theirs.stop


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_oss"])
def test_a_rows_draws_depend_neither_on_neighbours_nor_on_max_rows(arch: str) -> None:
    policy = tiny_policy(arch, ["a", "b"], stop_tokens=LETTERS)
    requests = mixed_requests(1.0)
    together = tokens(NativeSampler(policy).generate(requests))
    for max_rows in (1, 3, 5):
        assert tokens(NativeSampler(policy, max_rows).generate(requests)) == together
    for request, expected in zip(requests, together, strict=True):
        assert tokens(NativeSampler(policy).generate([request])) == [expected]
        fewer = replace(request, n=1, max_tokens=request.max_tokens + 3)
        ((alone,),) = tokens(NativeSampler(policy).generate([fewer]))
        assert alone[: len(expected[0])] == expected[0]
    backwards = tokens(NativeSampler(policy).generate(requests[::-1]))
    assert backwards[::-1] == together


def test_the_seed_decides_the_completions() -> None:
    sampler = NativeSampler(tiny_policy())
    request = Request(prompt(5), n=4, max_tokens=8, adapter="a", seed=3)
    (first,), (again,) = tokens(sampler.generate([request])), tokens(sampler.generate([request]))
    assert first == again
    assert len(set(first)) == 4, "completions of one request have streams of their own"
    (other,) = tokens(sampler.generate([replace(request, seed=4)]))
    assert not set(other) & set(first)
    tuples = [(3, 0, 7), (3, 1, 7), (4, 0, 7), (3, 7, 0), (3, 0, 7 << 32)]
    drawn = [tokens(sampler.generate([replace(request, seed=seed)]))[0] for seed in tuples]
    assert len(set(itertools.chain(*drawn))) == 4 * len(tuples)


def test_completions_follow_the_models_distribution() -> None:
    """First tokens of many completions of one request against the softmax, in 12 bins of about equal probability."""
    policy = tiny_policy()
    request = Request(prompt(6), n=4000, max_tokens=1, temperature=0.7, adapter="a", seed=5)
    (completions,) = NativeSampler(policy, max_rows=1000).generate([request])
    turn = as_turn(request, completions[0])
    p = Oracle(policy).distributions(turn, "a", 0.7)[0].detach().exp()
    bins = (p.cumsum(0) * 12).long().clamp_max(11)
    drawn = torch.tensor([c.token_ids[0] for c in completions])
    assert fits(bins[drawn], torch.zeros(12).double().index_add_(0, bins, p))


def fits(drawn: Tensor, p: Tensor) -> bool:
    """Pearson's chi-squared test at one in 10^5 (Wilson and Hilferty's cube-root approximation)."""
    assert not drawn.numel() or p[drawn].min() > 0
    p, drawn = p[p > 0], (p > 0).cumsum(0)[drawn] - 1
    expected = p * len(drawn)
    statistic = float(((torch.bincount(drawn, minlength=len(p)) - expected) ** 2 / expected).sum())
    df = len(p) - 1
    return statistic < df * (1 - 2 / (9 * df) + 4.265 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("V", [2, 3, 7, 16, 29, 65])
def test_sample_draws_from_the_softmax(V: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(V, generator=generator)
    logits[torch.randperm(V, generator=generator)[: V // 4]] = -torch.inf
    n = 20_000
    drawn, logprobs = sample(
        logits.expand(n, V), torch.full((n,), temperature), torch.rand(n, generator=generator)
    )  # fmt: skip
    exact = (logits.double() / temperature).log_softmax(-1)
    assert fits(drawn, exact.exp())
    torch.testing.assert_close(logprobs.double(), exact[drawn], rtol=0, atol=1e-5)
    assert not fits(drawn, (logits.double() / temperature / 1.3).softmax(-1)), "the test has no power"


@settings(max_examples=200, deadline=None)
@given(
    V=st.integers(1, 300),
    n_possible=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 10_000),
)
def test_a_token_without_probability_is_never_drawn(V: int, n_possible: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    possible = torch.randperm(V, generator=generator)[:n_possible]
    logits = torch.full((V,), -torch.inf)
    logits[possible] = torch.randn(len(possible), generator=generator) * spread
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24])
    uniforms = torch.cat([edges, torch.rand(20, generator=generator)])
    drawn, logprobs = sample(logits.expand(len(uniforms), V), torch.ones(len(uniforms)), uniforms)
    assert torch.isin(drawn, possible).all()
    assert logprobs.isfinite().all()
    assert (logprobs.exp() > 0).all()


@settings(max_examples=100, deadline=None)
@given(V=st.integers(1, 3000), seed=st.integers(0, 10_000))
def test_sample_inverts_the_cumulative_distribution(V: int, seed: int) -> None:
    """The token at which the cumulative probability, in vocabulary order, passes the uniform number; to rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(8, V, generator=generator) * 3, torch.rand(8, generator=generator)
    drawn, _ = sample(logits, torch.ones(8), uniforms)
    above = logits.double().softmax(-1).cumsum(-1).gather(1, drawn[:, None])[:, 0]
    below = above - logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert (below <= uniforms + 1e-6).all()
    assert (above >= uniforms - 1e-6).all()


def test_rows_of_a_batch_have_temperatures_of_their_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, 3)
    drawn, logprobs = sample(logits, torch.tensor([0.0, 0.1, 10.0]), torch.tensor([0.01, 0.01, 0.01]))
    assert drawn.tolist() == [2, 2, 0]
    exact = torch.stack([logits[0], logits[0] / 0.1, logits[0] / 10]).log_softmax(-1)
    torch.testing.assert_close(logprobs, exact[torch.arange(3), drawn])


def test_a_stop_token_ends_a_reply_and_is_part_of_it() -> None:
    policy = tiny_policy(stop_tokens=LETTERS)
    stops = policy.chat.stop_ids
    assert EOS_ID in stops
    (completions,) = NativeSampler(policy).generate([Request(prompt(5), n=60, max_tokens=6, adapter="a")])
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert not stops & set(completion.token_ids[:-1])
        if completion.stop is Stop.END:
            assert completion.token_ids[-1] in stops
        else:
            assert completion.stop is Stop.LENGTH
            assert len(completion.token_ids) == 6
            assert completion.token_ids[-1] not in stops
    assert {len(c.token_ids) for c in completions if c.stop is Stop.END} >= {1, 2, 3}
    assert any(c.stop is Stop.LENGTH for c in completions)


@pytest.mark.parametrize("shared", [True, False])
def test_each_request_ends_at_its_own_stop_tokens(shared: bool) -> None:
    policy = tiny_policy(stop_tokens=LETTERS)
    policy.not_shared = None if shared else "for the test"
    asked = Request(prompt(5), n=30, max_tokens=6, adapter="a")
    never = replace(asked, stop_ids=frozenset())
    (whole,) = NativeSampler(policy).generate([never])
    some = frozenset(completion.token_ids[0] for completion in whole[:5])
    several = frozenset(range(VOCAB_SIZE - 1, VOCAB_SIZE // 2, -1))
    stops = (frozenset[int](), some, policy.chat.stop_ids, several)
    # Rows that cannot start at once come in beside others, with more stop tokens than those have.
    for max_rows in (256, 40):
        sampler = NativeSampler(policy, max_rows)
        found = sampler.generate([never, replace(asked, stop_ids=some), asked, replace(asked, stop_ids=several)])
        for stop_ids, completions in zip(stops, found, strict=True):
            for completion, all_tokens in zip(completions, whole, strict=True):
                ends = (i for i, token in enumerate(all_tokens.token_ids, 1) if token in stop_ids)
                end = next(ends, None)
                assert completion.token_ids == all_tokens.token_ids[:end]
                assert completion.stop is (Stop.LENGTH if end is None else Stop.END)


def test_the_next_turn_has_stop_tokens_of_its_own() -> None:
    policy = tiny_policy()
    first = Request(prompt(5), max_tokens=4, temperature=0, stop_ids=frozenset())

    def follow(i: int, k: int, completion: Completion) -> Request | None:
        if len(completion.token_ids) < 4:
            return None  # the second turn, which ends with its first token
        ids = (*first.prompt_ids, *completion.token_ids, 7)
        return Request(ids, max_tokens=3, temperature=0, stop_ids=frozenset(range(VOCAB_SIZE)))

    ((completion,),) = NativeSampler(policy).generate([first], follow=follow)
    assert completion.stop is Stop.END
    assert len(completion.token_ids) == 1


def test_a_row_that_was_cut_off_does_not_end_because_its_neighbours_go_on() -> None:
    policy = tiny_policy(stop_tokens=LETTERS[:6])
    for seed in range(6):
        short = Request(prompt(5), n=6, max_tokens=1, adapter="a", seed=seed)
        cut_off, _ = NativeSampler(policy).generate([short, replace(short, n=60, max_tokens=6)])
        (alone,) = NativeSampler(policy).generate([short])
        assert [c.stop for c in cut_off] == [c.stop for c in alone]
        assert [c.token_ids for c in cut_off] == [c.token_ids for c in alone]


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_that_ends_with_its_last_token_has_ended_and_was_not_cut_off(shared: bool) -> None:
    policy = tiny_policy(stop_tokens=LETTERS)
    policy.not_shared = None if shared else "for the test"
    request = Request(prompt(5), n=60, max_tokens=1, adapter="a")
    (completions,) = NativeSampler(policy).generate([request])
    for completion in completions:
        assert len(completion.token_ids) == 1
        assert (completion.stop is Stop.END) == (completion.token_ids[0] in policy.chat.stop_ids)
    assert {c.stop for c in completions} == {Stop.END, Stop.LENGTH}


def test_on_token_is_told_of_every_token() -> None:
    policy = tiny_policy(adapters=["a", "b"], stop_tokens=LETTERS)
    told: list[int] = []
    completions = NativeSampler(policy, max_rows=7).generate(mixed_requests(1.0), told.append)
    assert sum(told) == sum(len(c.token_ids) for row in completions for c in row)


def test_an_update_of_the_adapter_is_seen_at_once() -> None:
    policy = tiny_policy()
    request = Request(prompt(5), max_tokens=10, temperature=0, adapter="a")
    before = tokens(NativeSampler(policy).generate([request]))
    with torch.no_grad():
        policy.bank["a"].flat.zero_()
    after = tokens(NativeSampler(policy).generate([request]))
    assert after != before
    assert after == tokens(NativeSampler(policy).generate([replace(request, adapter=None)]))


def test_the_sampler_proves_that_it_reads_the_weights_that_have_changed() -> None:
    policy = tiny_policy()
    sampler = NativeSampler(policy)
    policy.bank["a"].version += 1
    sampler.weights_changed("a", policy.bank["a"].version)
    with pytest.raises(ValueError, match=r"the sampler reads version 1 of adapter 'a', .* are of version 2"):
        sampler.weights_changed("a", 2)
    with pytest.raises(ValueError, match="no adapter is named 'z'"):
        sampler.weights_changed("z", 0)


def test_the_context_may_be_filled_to_the_last_token() -> None:
    policy = tiny_policy("gpt2")
    assert policy.context_length == 512
    full = Request(prompt(509), max_tokens=3, temperature=0)
    ((completion,),) = NativeSampler(policy).generate([full])
    assert completion.token_ids == greedy_by_transformers(policy, full)
    with pytest.raises(ValueError, match=r"509 tokens and a completion of up to 4 .* context of 512"):
        NativeSampler(policy).generate([replace(full, max_tokens=4)])


def test_bad_requests_are_refused() -> None:
    sampler = NativeSampler(tiny_policy())
    good = Request(prompt(3))
    for temperature in (-0.1, math.nan):
        with pytest.raises(ValueError, match="temperature must be >= 0, got"):
            sampler.generate([good, replace(good, temperature=temperature)])
    for bad in (replace(good, n=0), replace(good, max_tokens=0), replace(good, prompt_ids=())):
        with pytest.raises(ValueError, match="a request needs a prompt, n >= 1 and max_tokens >= 1; got"):
            sampler.generate([bad])
    with pytest.raises(ValueError, match=r"stop_ids must be tokens of the model, from 0 to .*; got -1"):
        sampler.generate([replace(good, stop_ids=frozenset({1, -1}))])
    with pytest.raises(ValueError, match="no adapter is named 'z'"):
        sampler.generate([replace(good, adapter="z")])
    with pytest.raises(ValueError, match="max_rows must be >= 1, got 0"):
        NativeSampler(sampler.policy, max_rows=0)
    assert sampler.generate([]) == []


def test_a_model_that_gives_nan_is_named_and_draws_nothing() -> None:
    policy = tiny_policy("llama", adapters=("a",))
    with torch.no_grad():
        policy.bank["a"].flat.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="under adapter 'a'"):
        NativeSampler(policy).generate([Request((1, 2, 3), n=2, adapter="a", seed=1)])


def tokens_and_logprobs(replies: list[list[Completion]]) -> tuple[list[tuple[int, ...]], list[float]]:
    flat = [completion for row in replies for completion in row]
    return [c.token_ids for c in flat], [p for c in flat for p in c.logprobs]


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    (tokens, logprobs), (expected_tokens, expected_logprobs) = map(tokens_and_logprobs, (found, expected))
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


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


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_that_waits_for_its_next_turn_holds_up_no_other(shared: bool) -> None:
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
    NativeSampler(policy).generate(requests, follow=follow)
    assert turns == [3] * 4
    assert seen == ([[1, 3, 3, 3]] if shared else [])


def test_what_follows_one_completion_is_one_completion() -> None:
    with pytest.raises(ValueError, match="one completion, got a request of n=2"):
        NativeSampler(tiny_policy()).generate([Request(prompt(3))], follow=lambda *_: Request(prompt(9), n=2))


@pytest.mark.parametrize("temperatures", [None, [1.0, 0.0, 0.5, 2.0, 1.0]])
def test_drawing_in_blocks_from_hidden_states_is_drawing_from_the_logits(
    temperatures: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again with fewer rows and with more, in the same working memory."""
    V, d = 37, 6
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", 2 * V)
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(V, d, generator=generator), torch.randn(V, generator=generator), scale=0.7, softcap=4.0)
    draw = InverseCDF(head)
    for R in (3, 1, 5, 2):
        hidden, uniforms = torch.randn(R, d, generator=generator), torch.rand(R, generator=generator)
        temperature = None if temperatures is None else torch.tensor(temperatures[:R])
        tokens, logprobs = draw(hidden, temperature, uniforms)
        expected, expected_logprobs = sample(head.logits(hidden), temperature, uniforms)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs)


def test_a_request_may_go_on_where_another_of_the_same_seed_ended() -> None:
    sampler = NativeSampler(tiny_policy("llama", ["a"]))
    whole, parts = (Request(prompt(9), n=6, max_tokens=5, seed=(3, 1), adapter="a"), [(0, 2), (2, 4)])
    together = tokens(sampler.generate([whole]))[0]
    apart = [tokens(sampler.generate([replace(whole, n=n, first=first)]))[0] for first, n in parts]
    assert [*apart[0], *apart[1]] == together
    assert len(set(together)) > 1


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


def test_a_recording_that_computes_something_else_is_not_used() -> None:
    policy = tiny_policy("llama", ["a"])
    sampler = NativeSampler(policy)
    requests = [Request(prompt(9), n=3, max_tokens=14, adapter="a")]
    expected = sampler.generate(requests)
    sampler.recorder = StepRecorder(lambda step, tokens: lambda tokens: step(tokens) * 1.1)
    with pytest.warns(UserWarning, match="hidden states of a recorded step differ"):
        assert sampler.generate(requests) == expected


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
