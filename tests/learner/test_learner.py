"""Learning: the gradient of the formula, whatever the micro-batches; one step an adapter, and nothing else moves.

Gradients are compared with float64 autograd through the formula itself, over all groups, one sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rl_lora.algorithms.objectives import grpo, reinforce
from rl_lora.config import LearnerConfig
from rl_lora.learner.advantages import advantages, shuffle_rewards
from rl_lora.learner.learner import Learner, SamplerLearnerMismatch
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.policy.policy import Policy
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Request
from rl_lora.types import Group
from tests.oracles import (
    Oracle,
    TokenObjective,
    as_turn,
    episode,
    gradient,
    group,
    relative_error,
    tiny_policy,
    turn,
    with_behaviour,
)
from tests.tiny import token_ids

LENGTHS = (1, 4, 7, 2, 5, 3)
LOOSE = LearnerConfig(max_sampler_learner_kl=100.0, max_grad_norm=0.0)
"""Takes any log-probabilities for the sampler's, and leaves the gradient as it is."""


def problem(adapter: str | None, seed: int, rewards: Sequence[float]) -> Group:
    """One prompt, and a reply of another length for each reward."""
    prompt = token_ids(1, 5 + seed % 4, seed)[0].tolist()
    replies = [turn(prompt, LENGTHS[i % len(LENGTHS)], seed=100 * seed + i) for i in range(len(rewards))]
    return group(
        *(episode(t, reward=r, adapter=adapter) for t, r in zip(replies, rewards, strict=True)), adapter=adapter
    )


def problems() -> list[Group]:
    """Three problems of adapter a, one of them without signal; two of b; one of the bare base."""
    return [
        problem("a", 1, [0.0, 1.0, 1.0, 0.0, 0.25]),
        problem("b", 2, [1.0, 0.0, 0.0]),
        problem("a", 3, [0.1, 0.1, 0.1]),
        problem(None, 4, [0.0, 1.0]),
        problem("a", 5, [2.0, -1.0, 0.0, 0.5]),
        problem("b", 6, [0.3, 0.3, 0.9, -0.3]),
    ]


def of(adapter: str, groups: Sequence[Group]) -> list[Group]:
    return [g for g in groups if g.adapter == adapter]


def n_tokens(groups: Sequence[Group]) -> int:
    return sum(e.n_tokens for g in groups for e in g.episodes)


def gradients(policy: Policy, groups: Sequence[Group], config: LearnerConfig = LOOSE) -> dict[str, Tensor]:
    """Of a step on the groups, which is then taken back."""
    before = {name: adapter.flat.detach().clone() for name, adapter in policy.bank.adapters.items()}
    stats = Learner(policy, config).step(groups)
    with torch.no_grad():
        for name, flat in before.items():
            policy.bank[name].flat.copy_(flat)
    return {a: gradient(policy.bank[a].flat).clone() for s in stats if (a := s.adapter) is not None}


def ratio_times_advantage(logprobs: Tensor, behaviour: Tensor, advantage: float) -> Tensor:
    return torch.exp(logprobs - behaviour) * advantage


def clipped(logprobs: Tensor, behaviour: Tensor, advantage: float) -> Tensor:
    """GRPO's objective by cases: beyond the bound that the advantage pushes against, a constant."""
    ratio = torch.exp(logprobs - behaviour)
    if advantage >= 0:
        return torch.where(ratio > 1.3, torch.full_like(ratio, 1.3), ratio) * advantage
    return torch.where(ratio < 0.9, torch.full_like(ratio, 0.9), ratio) * advantage


@pytest.mark.parametrize("arch", ["llama", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("name, formula", [("reinforce", ratio_times_advantage), ("grpo", clipped)])
def test_the_gradient_and_the_record_are_those_of_the_formula(
    arch: str, name: Literal["reinforce", "grpo"], formula: TokenObjective
) -> None:
    policy = tiny_policy(arch, ["a", "b"])
    oracle = Oracle(policy, arch)
    groups = with_behaviour(problems(), oracle, noise=0.3, temperature=0.8)
    config = replace(LOOSE, objective=name, clip_low=0.1, clip_high=0.3, tokens_per_microbatch=40)
    signal: list[tuple[Group, list[float]]] = []
    for g in groups:
        if g.adapter is not None:
            rewards = np.array([e.reward for e in g.episodes])
            centred = rewards - rewards.mean() if rewards.std() > 1e-9 else 0 * rewards
            signal.append((g, (centred if name == "reinforce" else centred / (rewards.std() + 1e-6)).tolist()))
    expected = oracle.gradients(
        signal, formula, {a: float(n_tokens(of(a, groups))) for a in ("a", "b")}, temperature=0.8
    )
    before = {a: policy.bank[a].hash() for a in ("a", "b")}
    records = Learner(policy, config, temperature=0.8).step(groups)

    assert [r.adapter for r in records] == ["a", "b"]
    for record in records:
        a = record.adapter or ""
        grad = gradient(policy.bank[a].flat)
        assert relative_error(grad, expected[a]) < 1e-4
        assert policy.bank[a].hash() != before[a]
        assert record.grad_norm == pytest.approx(float(expected[a].norm()), rel=1e-4)
        assert (record.n_groups, record.n_groups_learned) == ((3, 2) if a == "a" else (2, 2))
        assert record.version == policy.bank[a].version == 1
        assert record.learning_rate == config.learning_rate

        mine = [
            (t, A) for g, As in signal if g.adapter == a for e, A in zip(g.episodes, As, strict=True) for t in e.turns
        ]
        mine = [(t, A) for t, A in mine if A]
        with torch.no_grad():
            full = torch.cat([oracle.distributions(t, a, 0.8) for t, _ in mine])
        tokens = torch.tensor([i for t, _ in mine for i in t.completion_ids])
        behaviour = torch.tensor([x for t, _ in mine for x in t.logprobs], dtype=torch.float64)
        A_N = torch.tensor([A for t, A in mine for _ in t.completion_ids], dtype=torch.float64)
        difference = full.gather(1, tokens[:, None])[:, 0] - behaviour
        ratio = difference.exp()
        cut = ((A_N > 0) & (ratio > 1.3)) | ((A_N < 0) & (ratio < 0.9))
        objective = torch.where(cut, torch.where(A_N > 0, 1.3, 0.9), ratio) if name == "grpo" else ratio
        assert record.n_tokens_learned == len(tokens)
        assert record.sampler_learner_kl == pytest.approx(float(difference.abs().mean()), rel=1e-3)
        assert record.entropy == pytest.approx(float(-(full.exp() * full).sum(-1).mean()), rel=1e-4)
        assert record.ratio_max == pytest.approx(float(ratio.max()), rel=1e-3)
        assert record.clip_fraction == pytest.approx(float(cut.double().mean()) if name == "grpo" else 0.0)
        assert record.loss == pytest.approx(float(-(objective * A_N).sum() / n_tokens(of(a, groups))), rel=1e-3)
        if name == "grpo":
            assert 0 < float(cut.double().mean()) < 1


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_micro_batches_leave_the_gradient_as_it_is(arch: str) -> None:
    policy = tiny_policy(arch, ["a", "b"])
    whole = gradients(policy, problems(), replace(LOOSE, tokens_per_microbatch=4096))
    for budget in (1, 16, 50):
        split = gradients(policy, problems(), replace(LOOSE, tokens_per_microbatch=budget))
        for name, grad in whole.items():
            assert relative_error(split[name], grad) < 1e-6


def test_a_group_without_signal_counts_in_the_denominator_and_nowhere_else() -> None:
    policy, told = tiny_policy(adapters=["a"]), list[int]()
    with_signal, silent = problem("a", 1, [0.0, 1.0, 1.0]), problem("a", 3, [0.1, 0.1, 0.1])
    alone, both = gradients(policy, [with_signal])["a"], gradients(policy, [with_signal, silent])["a"]
    share = n_tokens([with_signal]) / n_tokens([with_signal, silent])
    assert relative_error(both, alone * share) < 1e-6
    Learner(policy, LOOSE).step([with_signal, silent], told.append)
    assert sum(told) == n_tokens([replace(with_signal, episodes=with_signal.episodes)])


def test_an_adapters_gradient_does_not_depend_on_the_other_groups_of_the_step() -> None:
    policy = tiny_policy(adapters=["a", "b"])
    both = gradients(policy, problems())
    for name in ("a", "b"):
        assert relative_error(gradients(policy, of(name, problems()))[name], both[name]) < 1e-6


def test_a_step_moves_its_own_adapter_and_nothing_else() -> None:
    policy = tiny_policy(adapters=["a", "b", "c"])
    before, base = {name: a.hash() for name, a in policy.bank.adapters.items()}, policy.bank.base_hash()
    learner = Learner(policy, LOOSE)
    learner.step(of("a", problems()))
    assert policy.bank["a"].hash() != before["a"]
    a = policy.bank["a"].hash()
    learner.step(of("b", problems()))
    assert policy.bank["b"].hash() != before["b"]
    assert policy.bank["a"].hash() == a
    assert policy.bank["c"].hash() == before["c"]
    assert policy.bank.base_hash() == base
    assert [policy.bank[name].version for name in "abc"] == [1, 1, 0]
    assert all(p.grad is None for p in policy.model.parameters())


def test_without_any_signal_nothing_moves_momentum_included() -> None:
    policy = tiny_policy(adapters=["a", "b"])
    learner = Learner(policy, replace(LOOSE, weight_decay=0.1))
    learner.step(problems())
    hashes = {name: policy.bank[name].hash() for name in "ab"}
    optimizer = learner.optimizer(TrainableAdapter(policy.bank, "a"))
    state = {k: v.clone() for k, v in optimizer.state[policy.bank["a"].flat].items()}
    silent = [problem("a", 1, [1.0, 1.0, 1.0]), problem("a", 2, [0.5])]
    a, b = learner.step([*silent, problem("b", 3, [0.0, 1.0])])
    assert policy.bank["a"].hash() == hashes["a"]
    assert policy.bank["b"].hash() != hashes["b"]
    after = optimizer.state[policy.bank["a"].flat]
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert (a.version, b.version) == (1, 2)
    assert (a.n_groups, a.n_groups_learned, a.n_tokens_learned) == (2, 0, 0)
    assert {a.loss, a.entropy, a.sampler_learner_kl, a.ratio_max, a.clip_fraction, a.grad_norm, a.step_norm} == {None}
    assert (a.norms["A_norm"], a.norms["B_norm"]) == policy.bank["a"].norms()
    assert learner.step([]) == []


def test_the_gradient_is_scaled_down_to_its_bound_and_never_up() -> None:
    policy = tiny_policy()
    free = gradients(policy, of("a", problems()))["a"]
    for bound in (0.5 * float(free.norm()), 2 * float(free.norm())):
        clipped = gradients(policy, of("a", problems()), replace(LOOSE, max_grad_norm=bound))["a"]
        assert relative_error(clipped, free * min(1.0, bound / float(free.norm()))) < 1e-5
    (record,) = Learner(policy, replace(LOOSE, max_grad_norm=1e-3)).step(of("a", problems()))
    assert record.grad_norm == pytest.approx(float(free.norm()), rel=1e-5)


@pytest.mark.parametrize("off", [0.2, math.nan])
def test_a_mismatch_of_sampler_and_learner_stops_before_anything_moves(off: float) -> None:
    policy = tiny_policy(adapters=["a", "b"])
    groups = with_behaviour(problems(), Oracle(policy), noise=0.0)
    learner = Learner(policy, LearnerConfig(max_sampler_learner_kl=0.1))
    wrong = [
        replace(
            g,
            episodes=tuple(
                replace(e, turns=tuple(replace(t, logprobs=tuple(x + off for x in t.logprobs)) for t in e.turns))
                for e in g.episodes
            ),
        )
        if g.adapter == "b"
        else g
        for g in groups
    ]
    before = {name: policy.bank[name].hash() for name in "ab"}
    with pytest.raises(SamplerLearnerMismatch, match=r"disagree.* is (0\.2|nan), the bound is .*=0\.1"):
        learner.step(wrong)
    assert {name: policy.bank[name].hash() for name in "ab"} == before
    assert [policy.bank[name].version for name in "ab"] == [0, 0]
    for record in learner.step(groups):
        assert record.sampler_learner_kl is not None
        assert record.sampler_learner_kl < 1e-5
        assert record.ratio_max == pytest.approx(1, abs=1e-4)


def test_a_gradient_that_is_no_number_is_refused_before_anything_moves() -> None:
    policy = tiny_policy(adapters=["a", "b"])
    before = {name: policy.bank[name].hash() for name in "ab"}
    with pytest.raises(FloatingPointError, match="the gradient of adapter 'b' is nan; no step was taken"):
        Learner(policy, LOOSE).step([problem("a", 1, [0.0, 1.0]), problem("b", 2, [0.0, math.nan, 1.0])])
    assert {name: policy.bank[name].hash() for name in "ab"} == before


def test_a_step_is_that_of_adamw_on_separate_tensors() -> None:
    policy = tiny_policy()
    adapter = policy.bank["a"]
    twins = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    config = replace(LOOSE, learning_rate=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    reference = torch.optim.AdamW(twins, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    learner = Learner(policy, config)
    for g in of("a", problems()):
        before = [twin.detach().clone() for twin in twins]
        (record,) = learner.step([g])
        if record.grad_norm is None:
            continue
        for twin, parameter in zip(twins, adapter.parameters(), strict=True):
            twin.grad = gradient(parameter).clone()
        reference.step()
        for twin, parameter in zip(twins, adapter.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), twin.detach(), rtol=1e-6, atol=1e-7)
        moved = torch.cat([(twin - old).flatten() for twin, old in zip(twins, before, strict=True)])
        assert record.step_norm == pytest.approx(float(moved.detach().norm()), rel=1e-4)
        for norm, matrices in ((record.norms["A_norm"], twins[0::2]), (record.norms["B_norm"], twins[1::2])):
            assert norm == pytest.approx(math.sqrt(sum(float((m.detach() ** 2).sum()) for m in matrices)), rel=1e-5)
    assert adapter.version == 2


def test_updates_per_step_are_as_many_steps_on_shares_of_the_groups() -> None:
    groups = [problem("a", i, [0.0, 1.0, 0.5]) for i in range(4)]
    once, twice = tiny_policy(), tiny_policy()
    first, second = Learner(once, replace(LOOSE, updates_per_step=2)).step(groups)
    learner = Learner(twice, LOOSE)
    for share in (groups[0::2], groups[1::2]):
        learner.step(share)
    assert once.bank["a"].hash() == twice.bank["a"].hash()
    assert (first.version, second.version, second.n_groups) == (1, 2, 2)
    assert first.sampler_learner_kl is not None
    assert second.sampler_learner_kl is None, "the weights have moved: this is no mismatch of sampler and learner"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_advantages_are_those_of_their_formulas(rewards: list[float]) -> None:
    g = group(*(episode(turn([1], 1, seed=0), reward=r) for r in rewards))
    mean, std = sum(rewards) / len(rewards), float(np.std(rewards))
    found = {name: advantages(g, name) for name in ("mean", "standardized", "none")}
    if len(set(rewards)) == 1:
        assert found["mean"] is None
        assert found["standardized"] is None
    else:
        assert found["mean"] == pytest.approx([r - mean for r in rewards], abs=1e-9)
        assert found["standardized"] == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=1e-6)
    if any(rewards):
        assert found["none"] == pytest.approx(rewards)
    else:
        assert found["none"] is None


@pytest.mark.parametrize("rewards", [[0.1] * 3, [1 / 3] * 7, [0.0] * 4, [0.7]])
def test_equal_rewards_and_single_episodes_have_no_signal(rewards: list[float]) -> None:
    """The mean of three times 0.1 is not 0.1."""
    g = problem("a", 1, rewards)
    assert advantages(g, "mean") is None
    assert advantages(g, "standardized") is None
    assert (advantages(g, "none") is None) == (rewards[0] == 0)


def test_shuffling_deals_the_same_rewards_to_the_same_replies() -> None:
    groups = problems()
    shuffled = shuffle_rewards(groups, np.random.default_rng(0))

    def rewards(groups: Sequence[Group]) -> list[float]:
        return [e.reward for g in groups for e in g.episodes]

    assert sorted(rewards(shuffled)) == sorted(rewards(groups))
    assert rewards(shuffled) != rewards(groups)
    assert [[e.turns for e in g.episodes] for g in shuffled] == [[e.turns for e in g.episodes] for g in groups]
    assert rewards(shuffle_rewards(groups, np.random.default_rng(0))) == rewards(shuffled)
    assert sorted(rewards(shuffled)[:5]) != sorted(rewards(groups)[:5]), "rewards stay within their group"


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",  # slope: of the objective in log p; zero where it is clipped
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.6, 0.0),
        (0.5, 2.0, 1.0, 1.0),
        (1.1, -2.0, -2.2, -2.2),
        (1.5, -2.0, -3.0, -3.0),
        (0.5, -2.0, -1.8, 0.0),
        (0.95, -2.0, -1.9, -1.9),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_grpo_is_clipped_where_the_ratio_has_gone_far_enough(
    ratio: float, advantage: float, value: float, slope: float
) -> None:
    logprobs = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    arguments = logprobs, torch.tensor([-3.0]), torch.tensor([advantage])
    objective, cut = grpo(*arguments, clip_low=0.1, clip_high=0.3)
    objective.sum().backward()
    assert float(objective.detach()) == pytest.approx(value)
    assert float(gradient(logprobs)) == pytest.approx(slope)
    assert bool(cut) == (slope == 0 and advantage != 0)
    free, uncut = reinforce(*arguments)
    assert float(free.detach()) == pytest.approx(ratio * advantage)
    assert uncut is None


N_GOOD = 40


def p_good(policy: Policy, prompts: Sequence[Sequence[int]]) -> float:
    """Probability that the first token is one of the first 40, exactly: chance is 40 in 258."""
    oracle = Oracle(policy)
    with torch.no_grad():
        return float(np.mean([oracle.logits(ids, "a")[-1].softmax(-1)[:N_GOOD].sum() for ids in prompts]))


@pytest.mark.parametrize("objective", ["reinforce", "grpo"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_thirty_steps_teach_what_is_rewarded_and_shuffled_rewards_teach_nothing(
    objective: Literal["reinforce", "grpo"], shuffled: bool
) -> None:
    policy = tiny_policy(adapters=[])
    policy.bank.add("a", rank=4)
    prompts = [tuple(ids) for ids in token_ids(4, 6).tolist()]
    learner = Learner(policy, LearnerConfig(objective=objective, learning_rate=1e-2))
    sampler, rng = NativeSampler(policy), np.random.default_rng(0)
    before = p_good(policy, prompts)
    for step in range(30):
        requests = [Request(p, n=32, max_tokens=2, adapter="a", seed=(step, i)) for i, p in enumerate(prompts)]
        groups = [
            group(*(episode(as_turn(r, c), reward=float(c.token_ids[0] < N_GOOD)) for c in completions))
            for r, completions in zip(requests, sampler.generate(requests), strict=True)
        ]
        (record,) = learner.step(shuffle_rewards(groups, rng) if shuffled else groups)
        assert record.sampler_learner_kl is not None
        assert record.sampler_learner_kl < 1e-4, "on policy, sampler and learner agree at every step"
    change = p_good(policy, prompts) - before
    assert abs(change) < 0.1 if shuffled else change > 0.25
