"""Sampling: the tokens that `generate` of transformers chooses, from the distribution that the learner computes.

Rows are independent: of their neighbours, of the size of the batch, of whether prompts are shared.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rl_lora.kernels import decode_attention
from rl_lora.learner.learner import target_logprobs
from rl_lora.learner.packing import pack
from rl_lora.policy.policy import Policy
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Request
from rl_lora.types import Stop
from tests.oracles import Oracle, as_turn, episode, group, tiny_policy
from tests.sampler.examples import LETTERS, fits, mixed_requests, prompt, tokens
from tests.tiny import ARCHITECTURES, EOS_ID, PAD_ID, VOCAB_SIZE, tiny_model


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


def test_bfloat16_is_no_further_off_in_cpp_than_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean difference to log-probabilities in float64, of the same weights rounded to bfloat16."""
    policy = tiny_policy("llama", ["a"], dtype=torch.bfloat16)
    oracle = Oracle(policy, tiny_model("llama", dtype=torch.bfloat16))
    requests = [Request(prompt(length, length), 8, max_tokens=30, adapter="a", seed=length) for length in (3, 30, 60)]
    errors = []
    for supports in (decode_attention.supports, lambda *_: False):
        monkeypatch.setattr(decode_attention, "supports", supports)
        found: list[torch.Tensor] = []
        for request, completions in zip(requests, NativeSampler(policy).generate(requests), strict=True):
            for completion in completions:
                with torch.no_grad():
                    exact = oracle.logprobs(as_turn(request, completion), "a")
                found.append(torch.tensor(completion.logprobs).double() - exact)
        errors.append(float(torch.cat(found).abs().mean()))
    assert errors[0] < 1.1 * errors[1]


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
    with pytest.raises(ValueError, match="the weights of the base have changed"):
        sampler.weights_changed(None, 1)


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


def test_a_request_may_go_on_where_another_of_the_same_seed_ended() -> None:
    sampler = NativeSampler(tiny_policy("llama", ["a"]))
    whole, parts = (Request(prompt(9), n=6, max_tokens=5, seed=(3, 1), adapter="a"), [(0, 2), (2, 4)])
    together = tokens(sampler.generate([whole]))[0]
    apart = [tokens(sampler.generate([replace(whole, n=n, first=first)]))[0] for first, n in parts]
    assert [*apart[0], *apart[1]] == together
    assert len(set(together)) > 1
