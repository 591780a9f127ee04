"""Rewards, steps and resets that take a while: the sampler goes on meanwhile, and what is drawn stays the same."""

from __future__ import annotations

import asyncio
import functools
import random
import re
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import RolloutConfig
from rl_lora.envs import TextEnv
from rl_lora.envs.prompts import PromptsEnv
from rl_lora.policy.policy import Policy
from rl_lora.rewards import Unscorable
from rl_lora.rollout.calls import CallPool
from rl_lora.rollout.worker import MakeEnv, RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.types import Group
from tests.tiny import randomize, tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"say {i}", "answer": i} for i in range(8)]
JITTER = random.Random(0)


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = Policy(tiny_model("llama"), tiny_tokenizer(True))
    randomize(policy.bank.add("a", rank=2, seed=0), 0)
    return policy


def worker(policy: Policy, make_env: MakeEnv, **config: Any) -> RolloutWorker:
    limits = RolloutConfig(**{"max_tokens": 4, "max_turns": 5, **config})
    return RolloutWorker(make_env, NativeSampler(policy, max_rows=limits.max_rows), policy.chat, limits)


def prompts(reward: Any) -> MakeEnv:
    return lambda: gym.make("rl_lora/Prompts-v0", path=ROWS, reward=reward, eval_fraction=0.0, disable_env_checker=True)


def play(policy: Policy, make_env: MakeEnv, seeds: int = 4, n: int = 4, rounds: int = 1, **config: Any) -> list[Group]:
    same = worker(policy, make_env, **config)
    return [
        group
        for i in range(rounds)
        for group in same.collect(list(range(seeds)), adapters=["a"], n=n, random_seed=(1, i))
    ]


def value(completion: str) -> float:
    return zlib.crc32(completion.encode()) % 5


def quick(completion: str, answer: int) -> float:
    return value(completion)


def slow(completion: str, answer: int) -> float:
    time.sleep(0.06 + 0.04 * JITTER.random())
    return value(completion)


def slow_batch(completions: list[str], **kwargs: Any) -> list[float]:
    time.sleep(0.06 + 0.04 * JITTER.random())
    return [value(completion) for completion in completions]


async def slow_async(completion: str, answer: int) -> float:
    await asyncio.sleep(0.06 + 0.04 * JITTER.random())
    return value(completion)


async def slow_async_batch(completions: list[str], **kwargs: Any) -> list[float]:
    return await asyncio.gather(*(slow_async(completion, 0) for completion in completions))


SLOW = [slow, slow_batch, slow_async, slow_async_batch, [slow, slow_async], {"length": 0, "s": slow}]


@pytest.mark.parametrize("reward", SLOW, ids=lambda reward: getattr(reward, "__name__", "sum"))
def test_the_same_seed_gives_the_same_episodes_whatever_a_reward_takes(policy: Policy, reward: Any) -> None:
    def bare(groups: list[Group]) -> list[Any]:
        return [[(e.turns, e.stop, e.answer, e.reward) for e in group.episodes] for group in groups]

    free = [quick, quick] if isinstance(reward, list) else quick
    whole = bare(play(policy, prompts(free), rounds=2))
    assert bare(play(policy, prompts(reward), rounds=2)) == whole
    if reward is slow_batch:
        assert bare(play(policy, prompts(reward), rounds=2, reward_threads=1)) == whole


@pytest.mark.parametrize("reward", [slow, slow_async, slow_batch, slow_async_batch])
def test_calls_that_wait_run_at_the_same_time(policy: Policy, reward: Callable[..., Any]) -> None:
    same = worker(policy, prompts(reward))
    same.collect([0, 1], adapters=["a"], n=4)  # until it is known to wait
    same.collect([0, 1], adapters=["a"], n=4)
    waited = same.reward_seconds
    same.collect(list(range(8)), adapters=["a"], n=4)
    assert 0.0 < same.reward_seconds - waited < 0.06 * (8 if "batch" in reward.__name__ else 32)


def test_what_computes_stays_in_the_main_thread_and_what_waits_leaves_it(policy: Policy) -> None:
    threads: dict[str, set[threading.Thread]] = {"computes": set(), "waits": set()}

    def computes(completion: str, answer: int) -> float:
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            sum(range(1000))
        threads["computes"].add(threading.current_thread())
        return 0.0

    def waits(completion: str, answer: int) -> float:
        time.sleep(0.06)
        threads["waits"].add(threading.current_thread())
        return 0.0

    play(policy, prompts([computes, waits]), seeds=2)
    assert threads["computes"] == {threading.main_thread()}
    assert threads["waits"] > {threading.main_thread()}
    threads["waits"].clear()
    play(policy, prompts(waits), seeds=1, reward_threads=1)
    assert threads["waits"] == {threading.main_thread()}


@pytest.mark.parametrize("reward", [slow, slow_async])
def test_no_more_calls_run_at_a_time_than_are_allowed(policy: Policy, reward: Callable[..., Any]) -> None:
    running: list[int] = [0, 0]

    def counted(completion: str, answer: int) -> float:
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.06)
        running[0] -= 1
        return 0.0

    async def counted_async(completion: str, answer: int) -> float:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.06)
        running[0] -= 1
        return 0.0

    play(policy, prompts(counted if reward is slow else counted_async), reward_threads=3)
    assert 1 < running[1] <= 3


@pytest.mark.parametrize("kind", [slow, slow_async, slow_batch])
def test_what_a_slow_reward_raises_names_environment_seed_and_reply(policy: Policy, kind: Callable[..., Any]) -> None:
    async def failing_async(completion: str, answer: int) -> float:
        await slow_async(completion, answer)
        raise KeyError("verdict")

    def failing(completion: str, answer: int) -> float:
        slow(completion, answer)
        raise KeyError("verdict")

    def failing_batch(completions: list[str], **kwargs: Any) -> list[float]:
        slow(completions[0], 0)
        raise KeyError("verdict")

    reward = {slow: failing, slow_async: failing_async, slow_batch: failing_batch}[kind]
    with pytest.raises(
        ValueError, match=r"Prompts-v0, seed \d+: .*failing.* raised KeyError.*the reply was "
    ) as caught:
        play(policy, prompts(reward))
    assert re.search(r'test_slow_rewards\.py", line \d+, in failing', str(caught.value))


def test_unscorable_episodes_are_left_out_and_counted(policy: Policy) -> None:
    def down(completion: str, answer: int) -> float:
        if slow(completion, answer) < 2:
            raise Unscorable("503")
        return 1.0

    async def down_async(completion: str, answer: int) -> float:
        return down(completion, answer)

    free = play(policy, prompts(quick))
    left_out = [sum(episode.reward < 2 for episode in group.episodes) for group in free]
    assert sum(left_out) > 0
    for reward in (down, down_async):
        assert [group.n_unscorable for group in play(policy, prompts(reward))] == left_out


def test_a_batch_is_a_group_as_soon_as_its_last_reply_is_there(policy: Policy) -> None:
    seen: list[tuple[str, int, list[Any]]] = []

    def batch(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.append((prompts[0], len(completions), completion_ids))
        assert len(set(prompts)) == 1
        return [float(i) for i in range(len(completions))]

    groups = play(policy, prompts(batch), seeds=3, n=5)
    assert sorted(prompt for prompt, _, _ in seen) == sorted(group.episodes[0].observations[0] for group in groups)
    for group in groups:
        assert [episode.reward for episode in group.episodes] == [0.0, 1.0, 2.0, 3.0, 4.0]
        (ids,) = [ids for prompt, _, ids in seen if prompt == group.episodes[0].observations[0]]
        assert [tuple(one) for one in ids] == [episode.turns[0].completion_ids for episode in group.episodes]


def said(groups: list[Group]) -> list[Any]:
    """Episodes without what is rounded otherwise where others are decoded with them."""
    episodes = [episode for group in groups for episode in group.episodes]
    return [([turn.completion_ids for turn in e.turns], e.observations, e.reward, e.stop) for e in episodes]


class Guess(TextEnv):
    """Turns whose steps wait; a step notes who ran beside it."""

    def __init__(self, seconds: Callable[[], float], running: list[int]) -> None:
        super().__init__()
        self.seconds, self.running = seconds, running

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.n = 0
        return f"guess {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.running.append(self.running[-1] + 1)
        time.sleep(self.seconds())
        self.running.append(self.running[-1] - 1)
        self.n += 1
        return f"no, {value(action)}", value(action), value(action) == 0, self.n == 4, {}


def test_turns_are_the_same_whatever_a_step_takes_and_their_steps_run_together(policy: Policy) -> None:
    still, busy = [0], [0]
    free = play(policy, lambda: Guess(lambda: 0.0, still), rounds=2)
    jitter = lambda: Guess(lambda: 0.055 + 0.03 * JITTER.random(), busy)  # noqa: E731
    assert play(policy, jitter, rounds=2, wait_for_steps=True) == free
    rounded = play(policy, jitter, rounds=2)
    assert said(rounded) == said(free)
    assert max(still) == 1
    assert max(busy) > 1
    assert len({len(episode.turns) for group in free for episode in group.episodes}) > 1
    single = play(policy, lambda: Guess(lambda: 0.0, [0]), max_turns=1)
    assert play(policy, lambda: Guess(lambda: 0.06, [0]), max_turns=1) == single


class Sometimes(Guess):
    """Waits in the first step of problem 0, and takes down when steps end."""

    ended: list[tuple[int, float]]

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed = seed
        return super().start(seed)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(1.0 if self.seed == 0 and self.n == 0 else 0.0)
        self.n += 1
        self.ended.append((self.seed, time.perf_counter()))
        return "go on", 1.0, False, self.n == 3, {}


@pytest.mark.parametrize("limit", [False, True], ids=["bare", "wrapped"])
def test_others_are_decoded_while_the_step_of_one_waits(policy: Policy, limit: bool) -> None:
    Sometimes.ended = []

    def make() -> gym.Env[str, str]:
        env = Sometimes(lambda: 0.0, [0])
        return gym.wrappers.TimeLimit(env, 10) if limit else env

    same = worker(policy, make)
    same.calls._waited[Sometimes] = 1.0  # it has been seen to wait
    same.collect(list(range(4)), adapters=["a"], n=1)
    slow_ends = [end for seed, end in Sometimes.ended if seed == 0]
    assert len(slow_ends) == 3
    assert max(end for seed, end in Sometimes.ended if seed) < slow_ends[0]  # the others play all their turns meanwhile
    assert same.reward_seconds > 0.5  # when nothing is left to decode, it is waited for, and that is said


def test_resets_that_wait_do_so_together(policy: Policy) -> None:
    class Slow(Guess):
        def start(self, seed: int) -> tuple[str, dict[str, Any]]:
            time.sleep(0.1)
            return super().start(seed)

    same = worker(policy, lambda: Slow(lambda: 0.0, [0]))
    same.calls._waited["reset", Slow] = 1.0
    begin = time.perf_counter()
    groups = same.collect(list(range(16)), adapters=["a"], n=2)
    assert time.perf_counter() - begin < 0.1 * 32 / 2
    free = worker(policy, lambda: Guess(lambda: 0.0, [0])).collect(list(range(16)), adapters=["a"], n=2)
    assert said(groups) == said(free)


def test_a_step_of_its_own_leaves_the_main_thread_too(policy: Policy) -> None:
    threads = set()

    class Asks(PromptsEnv):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            time.sleep(0.06)
            threads.add(threading.current_thread())
            return super().step(action)

    play(policy, lambda: Asks(ROWS, reward=quick, eval_fraction=0.0))
    assert len(threads) > 1


def test_an_environment_with_a_step_of_its_own_is_stepped_as_it_is(policy: Policy) -> None:
    class Doubled(PromptsEnv):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            observation, reward, *rest = super().step(action)
            return (observation, 2 * reward, *rest)  # type: ignore[return-value]

    free = play(policy, prompts(quick))
    doubled = play(policy, lambda: Doubled(ROWS, reward=slow, eval_fraction=0.0))
    rewards = [[[e.reward for e in group.episodes] for group in groups] for groups in (free, doubled)]
    assert rewards[1] == [[2 * reward for reward in group] for group in rewards[0]]


def test_a_call_that_once_waits_long_is_known_to_wait_and_one_pause_is_forgiven() -> None:
    calls = CallPool(4)
    pauses = iter([0.06, 0.0, 0.06, 0.06])
    for _ in range(4):
        calls.start("a", lambda: time.sleep(next(pauses))).result()
    assert calls.n_elsewhere == 0
    assert calls.start("a", threading.current_thread).result() is not threading.main_thread()
    assert calls.start("b", threading.current_thread).result() is threading.main_thread()
    assert calls.start(None, threading.current_thread).result() is threading.main_thread()
    assert calls.n_elsewhere == 1


def test_a_call_in_four_that_waits_is_enough() -> None:
    calls = CallPool(4)
    for seconds in [0.0, 0.0, 0.0, 0.4] * 3:
        calls.start("a", functools.partial(time.sleep, seconds)).result()
    assert calls.start("a", threading.current_thread).result() is not threading.main_thread()
