"""Packing: every token that the model wrote is a target once, behind exactly its own context, at its own weight.

A packed batch is read back by the rules that `Batch` documents, and computed beside one model call a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lora.attention import prefixes
from rl_lora.learner.batch import Batch
from rl_lora.learner.learner import target_logprobs
from rl_lora.learner.packing import pack, trajectories
from rl_lora.policy.policy import Policy
from rl_lora.types import Episode, Group, Stop, Turn
from tests.oracles import Oracle, episode, gradient, group, relative_error, tiny_policy, turn
from tests.tiny import ARCHITECTURES, SLIDING_WINDOW, token_ids

Signal = list[tuple[Group, np.ndarray]]
Target = tuple[str | None, tuple[int, ...], int, float, float, float]
"""adapter, context, token, behaviour log-probability, advantage, weight"""


def sees(batch: Batch, flat: int) -> tuple[list[int], list[int]]:
    """The tokens that a hidden state may depend on, and their positions, by the rules in the docstrings."""
    if batch.tree is None:
        L = batch.tokens.shape[1]
        return list(range(flat // L * L, flat + 1)), list(range(flat % L + 1))
    (span,) = (k for k, (start, n, _) in enumerate(batch.tree.spans) if start <= flat < start + n)
    seen: list[int] = list(range(batch.tree.spans[span][0], flat + 1))
    while (span := batch.tree.spans[span][2]) >= 0:
        start, n, _ = batch.tree.spans[span]
        seen = [*range(start, start + n), *seen]
    return seen, batch.tree.positions[0, seen].tolist()


def read_back(batch: Batch) -> list[Target]:
    """Every target with the tokens that its hidden state may depend on."""
    found: list[Target] = []
    tokens = batch.tokens.flatten()
    reached: set[int] = set()
    for n, flat in enumerate(batch.index.tolist()):
        visible, positions = sees(batch, flat)
        assert positions == list(range(len(visible)))
        reached |= set(visible)
        floats = [float(x[n]) for x in (batch.behaviour_logprobs, batch.advantages, batch.weights)]
        context = tuple(tokens[visible].tolist())
        adapter = batch.adapters[flat * len(batch.adapters) // len(tokens)]
        found.append((adapter, context, int(batch.targets[n]), floats[0], floats[1], floats[2]))
    assert len(reached) == batch.n_tokens, "a token is computed from which nothing is learned"
    return found


def expected(signal: Signal, denominators: dict[str | None, float]) -> list[Target]:
    targets: list[Target] = []
    for g, advantages_G in signal:
        for e, advantage in zip(g.episodes, advantages_G, strict=True):
            for t in e.turns if advantage else ():
                for k, (token, logprob) in enumerate(zip(t.completion_ids, t.logprobs, strict=True)):
                    context = t.prompt_ids + t.completion_ids[:k]
                    weight = float(np.float32(1 / denominators[g.adapter]))
                    targets.append((g.adapter, context, token, logprob, float(np.float32(advantage)), weight))
    return targets


@st.composite
def signals(draw: st.DrawFn) -> Signal:
    """A few groups under two adapters: turns that continue the one before or do not, empty replies, any lengths."""
    tokens = st.integers(0, 5)  # few, so that prompts and completions begin alike by chance
    n_drawn = 0

    def reply(prompt: tuple[int, ...]) -> Turn:
        nonlocal n_drawn
        ids = tuple(draw(st.lists(tokens, max_size=5)))
        logprobs = tuple(-float(n_drawn + k) for k in range(len(ids)))  # each token has its own: it can be told apart
        n_drawn += len(ids)
        return Turn(prompt, ids, logprobs, Stop.END)

    found: Signal = []
    for _ in range(draw(st.integers(0, 4))):
        prompt = tuple(draw(st.lists(tokens, min_size=1, max_size=6)))
        episodes: list[Episode] = []
        for _ in range(draw(st.integers(1, 4))):
            turns = [reply(prompt)]
            for _ in range(draw(st.integers(0, 2))):
                before = turns[-1].prompt_ids + turns[-1].completion_ids if draw(st.booleans()) else prompt[:1]
                turns.append(reply(before + tuple(draw(st.lists(tokens, min_size=1, max_size=3)))))
            episodes.append(episode(*turns))
        advantages_G = draw(
            st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=len(episodes), max_size=len(episodes))
        )
        found.append((group(*episodes, adapter=draw(st.sampled_from(["a", "b"]))), np.array(advantages_G)))
    return found


@settings(max_examples=150, deadline=None)
@given(signal=signals(), budget=st.integers(1, 60), shared_prefix=st.booleans())
def test_every_written_token_is_a_target_once_behind_its_own_context(
    signal: Signal, budget: int, shared_prefix: bool
) -> None:
    denominators: dict[str | None, float] = {"a": 7.0, "b": 11.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_PREFIX", 1)  # so that prompts this short share prefixes
        batches = pack(signal, denominators=denominators, tokens_per_microbatch=budget, shared_prefix=shared_prefix)
    assert Counter(target for batch in batches for target in read_back(batch)) == Counter(
        expected(signal, denominators)
    )
    for batch in batches:
        if batch.tokens.numel() > budget:  # a trajectory that is too long has a batch of its own
            assert batch.tree is None or len(batch.tree.spans) <= 3, "a batch beyond the budget holds several"
            assert len(batch.tokens) == 1
        assert list(batch.adapters) == sorted(batch.adapters, key=str), "an adapter's rows are not neighbours"
        assert (batch.tree is not None) == shared_prefix


@settings(max_examples=50, deadline=None)
@given(signal=signals(), budget=st.integers(1, 60))
def test_weights_sum_to_the_share_of_tokens_that_have_a_signal(signal: Signal, budget: int) -> None:
    written = Counter(g.adapter for g, _ in signal for e in g.episodes for _ in range(e.n_tokens))
    learned = Counter(
        g.adapter for g, advantages in signal for e, a in zip(g.episodes, advantages, strict=True) if a
        for _ in range(e.n_tokens)
    )  # fmt: skip
    batches = pack(signal, denominators={k: float(v) for k, v in written.items()}, tokens_per_microbatch=budget)
    for name in written:
        mine = [
            float(b.weights[n])
            for b in batches
            for n, i in enumerate(b.index.tolist())
            if b.adapters[i * len(b.adapters) // b.tokens.numel()] == name
        ]
        assert sum(mine) == pytest.approx(learned[name] / written[name])


def test_a_prompt_is_computed_once_and_no_last_token_at_all() -> None:
    prompt = token_ids(1, 10)[0].tolist()
    g = group(*(episode(turn(prompt, n, seed=n)) for n in (1, 3, 6, 6)))
    (batch,) = pack([(g, np.ones(4))], denominators={"a": 1.0}, tokens_per_microbatch=100)
    assert batch.n_tokens == batch.tokens.numel() == 10 + 0 + 2 + 5 + 5
    plain = pack([(g, np.ones(4))], denominators={"a": 1.0}, tokens_per_microbatch=100, shared_prefix=False)
    assert sum(b.n_tokens for b in plain) == 4 * 10 + 0 + 2 + 5 + 5


def test_what_prompts_of_an_adapter_begin_with_is_computed_once() -> None:
    head, tails = token_ids(1, 20)[0].tolist(), [[1, 2, 3], [4], [4, 5]]
    groups = [group(*(episode(turn(head + tail, n, seed=n)) for n in (2, 4))) for tail in tails]
    other = group(episode(turn([*head, 6, 7], 3, seed=0), adapter="b"), adapter="b")  # has nobody to share with
    signal = [(g, np.ones(len(g.episodes))) for g in (*groups, other)]
    denominators: dict[str | None, float] = {"a": 1.0, "b": 1.0}
    (batch,) = pack(signal, denominators=denominators, tokens_per_microbatch=200)
    assert batch.n_tokens == 20 + (3 + 1 + 2) + 3 * (1 + 3) + (22 + 2)
    assert Counter(read_back(batch)) == Counter(expected(signal, denominators))
    assert all(b.tokens.numel() <= 40 for b in pack(signal, denominators=denominators, tokens_per_microbatch=40))


def test_episodes_without_advantage_and_empty_replies_cost_nothing() -> None:
    prompt = token_ids(1, 4)[0].tolist()
    g = group(*(episode(turn(prompt, n, seed=n)) for n in (3, 0, 5)))
    (batch,) = pack([(g, np.array([1.0, 1.0, 0.0]))], denominators={"a": 1.0}, tokens_per_microbatch=100)
    assert batch.n_tokens == 4 + 2
    assert pack([(g, np.zeros(3))], denominators={"a": 1.0}, tokens_per_microbatch=100) == []
    assert pack([], denominators={}, tokens_per_microbatch=100) == []


def test_a_prompt_may_hold_what_another_prompt_was_answered() -> None:
    long = turn([1, 2, 3, 4], 2, seed=0, logprobs=[-1.0, -2.0])
    short = Turn((1, 2), (3,), (-3.0,), Stop.LENGTH)  # its only token is one of the other's prompt
    for g in (group(episode(long), episode(short)), group(episode(short), episode(long))):
        signal = [(g, np.ones(2))]
        denominators: dict[str | None, float] = {"a": 1.0}
        (batch,) = pack(signal, denominators=denominators, tokens_per_microbatch=100)
        assert Counter(read_back(batch)) == Counter(expected(signal, denominators))


def test_turns_that_continue_one_another_are_one_trajectory_and_others_are_not() -> None:
    first = turn([1, 2, 3], 4, seed=0)
    second = turn([*first.prompt_ids, *first.completion_ids, 9, 9], 2, seed=1)
    elsewhere = turn([1, 2, 3, 0, 9], 2, seed=2)
    assert [[start for start, _ in t.spans] for t in trajectories(episode(first, second), 1.0)] == [[3, 9]]
    assert [[start for start, _ in t.spans] for t in trajectories(episode(first, second, elsewhere), 1.0)] == [
        [3, 9],
        [5],
    ]
    (both,) = trajectories(episode(first, second), 1.0)
    assert both.ids == second.prompt_ids + second.completion_ids
    assert list(trajectories(episode(turn([1], 0, seed=0)), 1.0)) == []


def conversation(adapter: str, seed: int) -> Group:
    """One group with everything in it: replies of 1 to 12 tokens, ended and cut off, a second turn, a fresh start."""
    prompt = token_ids(1, 9, seed)[0].tolist()
    first = turn(prompt, 5, seed=seed + 1, ends=True)
    second = turn([*first.prompt_ids, *first.completion_ids, 7, 8, 9], 3, seed=seed + 2)
    forgetful = turn([*prompt[:4], 11, 12], 4, seed=seed + 3)
    return group(
        episode(turn(prompt, 1, seed=seed + 4, ends=True), adapter=adapter),
        episode(first, second, adapter=adapter),
        episode(turn(prompt, 12, seed=seed + 5), adapter=adapter),
        episode(first, forgetful, adapter=adapter),
        episode(turn(prompt, 2, seed=seed + 6), adapter=adapter),
        adapter=adapter,
    )


def numbered(groups: Sequence[Group]) -> tuple[list[Group], list[Turn]]:
    """The groups with log-probabilities that number their tokens, and their turns in that order."""
    turns: list[Turn] = []
    n = 0

    def number(t: Turn) -> Turn:
        nonlocal n
        turns.append(Turn(t.prompt_ids, t.completion_ids, tuple(float(n + k) for k in range(len(t.logprobs))), t.stop))
        n += len(t.logprobs)
        return turns[-1]

    return [
        group(*(episode(*map(number, e.turns), adapter=g.adapter) for e in g.episodes), adapter=g.adapter)
        for g in groups
    ], turns


def packed(policy: Policy, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities in the order in which the tokens are numbered, and the gradient of each adapter."""
    for adapter in policy.bank.adapters.values():
        adapter.zero_grad()
    logprobs = torch.full((sum(len(batch.targets) for batch in batches),), torch.nan)
    for batch in batches:
        found, _ = target_logprobs(policy, batch, temperature=0.8)
        (found * batch.advantages * batch.weights).sum().backward()
        logprobs[batch.behaviour_logprobs.long()] = found.detach()
    return logprobs, {name: gradient(adapter.flat).clone() for name, adapter in policy.bank.adapters.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_batches_give_the_logprobs_and_gradients_of_one_sequence_at_a_time(arch: str) -> None:
    policy = tiny_policy(arch, adapters=["a", "b"])
    assert policy.not_shared is None
    groups, turns = numbered([conversation("a", 0), conversation("b", 100)])
    assert max(len(t.prompt_ids + t.completion_ids) for t in turns) > 2 * SLIDING_WINDOW
    advantages = [np.array([1.0, -0.5, 2.0, -1.5, 1.0]), np.array([-1.0, 1.0, 0.5, 2.0, -2.0])]
    denominators: dict[str | None, float] = {g.adapter: float(sum(e.n_tokens for e in g.episodes)) for g in groups}

    oracle = Oracle(policy, arch)
    by_name = {str(name): n for name, n in denominators.items()}
    signal = list(zip(groups, advantages, strict=True))
    exact_gradient = oracle.gradients(
        [(g, a.tolist()) for g, a in signal], lambda logprobs, _, advantage: -logprobs * advantage, by_name, 0.8
    )
    adapters = [g.adapter for g in groups for e in g.episodes for _ in e.turns]
    with torch.no_grad():
        exact = torch.cat([oracle.logprobs(t, adapter, 0.8) for t, adapter in zip(turns, adapters, strict=True)])

    for shared_prefix, budget in [(True, 1000), (True, 30), (True, 1), (False, 1000)]:
        batches = pack(
            signal, denominators=denominators, tokens_per_microbatch=budget, shared_prefix=shared_prefix
        )  # fmt: skip
        policy.not_shared = None if shared_prefix else "for the test"
        logprobs, gradients = packed(policy, batches)
        torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-4)
        for name, grad in gradients.items():
            assert relative_error(grad, exact_gradient[name]) < 1e-4, (shared_prefix, budget, name)
        if shared_prefix and budget == 1000:
            assert len(batches) == 1
            assert batches[0].tree is not None
            assert len(batches[0].tree.depths) == 2
            assert set(batches[0].adapters) == {"a", "b"}
        if budget == 30:
            assert len(batches) > 2


def test_positions_behind_a_long_shared_prompt_leave_the_window_at_the_right_token() -> None:
    """Gemma 3's window slides over the end of the prompt, and not over other completions that stand between."""
    policy = tiny_policy("gemma3")
    prompt = token_ids(1, SLIDING_WINDOW - 2)[0].tolist()
    groups, turns = numbered([group(*(episode(turn(prompt, SLIDING_WINDOW + 4, seed=i)) for i in range(5)))])
    (batch,) = pack([(groups[0], np.ones(5))], denominators={"a": 1.0}, tokens_per_microbatch=200)
    oracle = Oracle(policy, "gemma3")
    with torch.no_grad():
        exact = torch.cat([oracle.logprobs(t, "a", 0.8) for t in turns])
    torch.testing.assert_close(packed(policy, [batch])[0].double(), exact, rtol=0, atol=1e-4)
