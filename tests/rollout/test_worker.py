"""The promises of `rollout/worker.py`, kept with a tiny policy, the native sampler and real environments: no mocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import RolloutConfig
from rl_lora.envs import TextEnv
from rl_lora.metrics.records import summarize_groups
from rl_lora.policy.policy import Policy
from rl_lora.rollout.worker import EpisodeRequest, MakeEnv, RolloutWorker
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Completion, Follow, Later, Request
from rl_lora.types import Group, Stop
from tests.tiny import randomize, tiny_model, tiny_tokenizer

SEEDS = [3, 4, 5]


class GuessEnv(TextEnv):
    """Guess a remainder: the first character's code modulo 3. A wrong guess is explained, and asked again.

    A reply that begins with a control character cannot be judged.
    """

    def __init__(self, tries: int = 100, judged: bool = True) -> None:
        super().__init__()
        self.tries, self.judged = tries, judged

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.remainder, self.n = seed % 3, 0
        return f"guess {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.n += 1
        code = ord(action[0]) if action else 0
        if code < 32 and not self.judged:
            return "", 0.0, False, False, {"unscorable": "a control character"}
        right = code % 3 == self.remainder
        info: dict[str, Any] = {"reward_parts": {"tries": 1.0, "right": float(right)}, "is_success": right}
        return f"no, {self.n}", 1.0 if right else -0.125, right, self.n == self.tries, info


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = Policy(tiny_model("llama"), tiny_tokenizer(True))
    for seed, name in enumerate("ab"):
        randomize(policy.bank.add(name, rank=2, seed=seed), seed)
    return policy


def worker(policy: Policy, make_env: MakeEnv = GuessEnv, context_length: int = 512, **config: Any) -> RolloutWorker:
    limits = RolloutConfig(**{"max_tokens": 4, "max_turns": 5, **config})
    versions = {"a": 7, "b": 9}.__getitem__
    sampler = NativeSampler(policy, max_rows=limits.max_rows)
    return RolloutWorker(make_env, sampler, policy.chat, limits, context_length=context_length, versions=versions)


def collect(policy: Policy, seeds: list[int] = SEEDS, n: int = 4, adapters: Any = ("a",), **kwargs: Any) -> list[Group]:
    return worker(policy, **kwargs).collect(seeds, adapters=list(adapters), n=n, random_seed=(1, 2))


def test_groups_come_by_adapter_then_by_seed_and_hold_n_episodes_of_one_problem(policy: Policy) -> None:
    groups = collect(policy, [5, 3], adapters=("b", None, "a"))
    assert [(g.adapter, g.seed) for g in groups] == [(a, s) for a in ("b", None, "a") for s in (5, 3)]
    for group in groups:
        assert len(group.episodes) == 4
        assert group.env_id == "GuessEnv"
        for episode in group.episodes:
            assert (episode.adapter, episode.seed, episode.env_id) == (group.adapter, group.seed, group.env_id)
            assert episode.observations[0] == f"guess {group.seed}"
            assert episode.version == {"a": 7, "b": 9, None: 0}[group.adapter]
        assert len({episode.turns[0].prompt_ids for episode in group.episodes}) == 1
        assert len({episode.turns[0].completion_ids for episode in group.episodes}) > 1


def test_turns_follow_each_other_to_the_token_until_the_environment_ends(policy: Policy) -> None:
    episodes = [episode for group in collect(policy) for episode in group.episodes]
    lengths = {len(episode.turns) for episode in episodes}
    assert len(lengths) > 2
    for episode in episodes:
        for i, (turn, following) in enumerate(zip(episode.turns, episode.turns[1:], strict=False), 1):
            so_far = turn.prompt_ids + turn.completion_ids
            assert following.prompt_ids[: len(so_far)] == so_far
            assert f"no, {i}" in policy.chat.tokenizer.decode(list(following.prompt_ids[len(so_far) :]))
        assert all(turn.text == policy.chat.decode(turn.completion_ids) for turn in episode.turns)
        assert episode.observations == (f"guess {episode.seed}", *(f"no, {i}" for i in range(1, len(episode.turns))))
        assert episode.stop is (Stop.END if episode.success else Stop.LENGTH)
        assert episode.success or len(episode.turns) == 5


def test_rewards_and_parts_are_summed_over_the_turns_and_the_verdict_is_the_last(policy: Policy) -> None:
    episodes = [episode for group in collect(policy) for episode in group.episodes]
    assert {episode.success for episode in episodes} == {True, False}
    for episode in episodes:
        wrong = len(episode.turns) - bool(episode.success)
        assert episode.reward == pytest.approx(bool(episode.success) - 0.125 * wrong)
        assert episode.reward_parts == {"tries": len(episode.turns), "right": float(bool(episode.success))}
    record = summarize_groups(collect(policy))
    assert record["accuracy"] == sum(bool(episode.success) for episode in episodes) / len(episodes)
    assert record["parts/tries"] == record["turns_per_episode"] > 1


def test_the_turn_limit_and_the_environments_own_limit_cut_off(policy: Policy) -> None:
    for limit in ({"max_turns": 2}, {"make_env": lambda: GuessEnv(tries=2)}):
        for group in collect(policy, **limit):
            for episode in group.episodes:
                assert len(episode.turns) <= 2
                assert (episode.stop is Stop.LENGTH) is (not episode.success)
                assert episode.truncated or episode.turns[-1].stop is Stop.END


def test_a_conversation_that_outgrows_the_context_is_cut_off_before_it_is_sampled(policy: Policy) -> None:
    room = 90
    episodes = [episode for group in collect(policy, context_length=room) for episode in group.episodes]
    unfinished = [episode for episode in episodes if not episode.success]
    assert unfinished
    for episode in episodes:
        assert all(len(turn.prompt_ids) + 4 <= room for turn in episode.turns)
    assert all(episode.stop is Stop.LENGTH and len(episode.turns) < 5 for episode in unfinished)


def test_unscorable_episodes_are_left_out_and_counted_never_scored_zero(policy: Policy) -> None:
    judged = collect(policy, n=16)
    groups = collect(policy, n=16, make_env=lambda: GuessEnv(judged=False))
    assert sum(group.n_unscorable for group in groups) > 0
    for group, whole in zip(groups, judged, strict=True):
        assert len(group.episodes) + group.n_unscorable == 16
        replies = [[turn.text for turn in episode.turns] for episode in group.episodes]
        left = [e for e in whole.episodes if all(turn.text and ord(turn.text[0]) >= 32 for turn in e.turns)]
        assert replies == [[turn.text for turn in episode.turns] for episode in left]
        assert all(episode.stop is not Stop.UNSCORABLE for episode in group.episodes)
    record = summarize_groups(groups)
    assert record["unscorable"] == sum(group.n_unscorable for group in groups) / 48


def test_a_group_that_nobody_could_judge_is_empty(policy: Policy) -> None:
    class Broken(GuessEnv):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return "", 1.0, True, False, {"unscorable": "always"}

    groups = collect(policy, make_env=Broken)
    assert [(group.episodes, group.n_unscorable) for group in groups] == [((), 4)] * 3
    assert summarize_groups(groups)["reward"] is None


def content(groups: list[Group]) -> dict[int, list[tuple[Any, ...]]]:
    return {
        g.seed: [(*(turn.completion_ids for turn in episode.turns), episode.reward) for episode in g.episodes]
        for g in groups
    }


def test_the_random_seed_fixes_a_group_whatever_else_is_played(policy: Policy) -> None:
    alone, whole = content(collect(policy)), content(collect(policy, [9, *reversed(SEEDS), 8]))
    assert {seed: whole[seed] for seed in SEEDS} == alone
    assert content(collect(policy, max_rows=5)) == alone
    both = collect(policy, adapters=("b", "a"))
    assert content(both[3:]) == alone
    assert content(both[:3]) != alone


def test_another_random_seed_draws_other_groups_and_a_worker_can_be_used_again(policy: Policy) -> None:
    same = worker(policy)
    first = same.collect(SEEDS, adapters=["a"], n=4, random_seed=(1, 2))
    other = same.collect(SEEDS, adapters=["a"], n=4, random_seed=(1, 3))
    again = same.collect(SEEDS, adapters=["a"], n=4, random_seed=(1, 2))
    assert first == again
    assert content(first) != content(other)
    same.close()
    same.close()


def test_every_reply_is_drawn_from_a_stream_of_its_own(policy: Policy) -> None:
    streams: list[tuple[Any, ...]] = []

    class Recording(NativeSampler):
        def generate(
            self, requests: Sequence[Request], on_token: Any = None, follow: Follow | None = None
        ) -> list[list[Completion]]:
            def listen(i: int, k: int, completion: Completion) -> Request | None:
                assert follow is not None
                request = follow(i, k, completion)
                assert not isinstance(request, Later)
                if request is not None:
                    streams.append((request.seed, 0))
                return request

            streams.extend((request.seed, row) for request in requests for row in range(request.n))
            return super().generate(requests, on_token, listen)

    same = worker(policy)
    same.sampler = Recording(policy)
    groups = same.collect(SEEDS, adapters=["a"], n=6, random_seed=(1, 2))
    assert len(streams) == sum(len(episode.turns) for group in groups for episode in group.episodes)
    assert len(set(streams)) == len(streams)


def test_an_environment_that_does_not_speak_text_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="CartPole-v1 gives ndarray observations; a text environment gives str"):
        collect(policy, make_env=lambda: gym.make("CartPole-v1"))


def test_a_prompt_that_is_too_long_is_refused_with_its_length_and_the_room_there_is(policy: Policy) -> None:
    first = worker(policy).first_prompt(3)
    assert worker(policy, context_length=len(first) + 4).first_prompt(3) == first
    message = rf"GuessEnv, seed 3, has {len(first)} tokens, .* leaves {len(first) - 1} beside rollout.max_tokens=4"
    with pytest.raises(ValueError, match=message):
        worker(policy, context_length=len(first) + 3).first_prompt(3)
    with pytest.raises(ValueError, match=message):
        collect(policy, context_length=len(first) + 3)


def test_the_system_prompt_opens_every_conversation(policy: Policy) -> None:
    plain, opened = worker(policy), worker(policy, system_prompt="Guess well.")
    assert opened.first_prompt(3) == policy.chat.start("guess 3", "Guess well.")
    assert plain.first_prompt(3) == policy.chat.start("guess 3")
    (group,) = opened.collect([3], adapters=[None], n=1)
    assert group.episodes[0].turns[0].prompt_ids == tuple(opened.first_prompt(3))


def test_registered_environments_are_played_under_their_id(policy: Policy) -> None:
    (group,) = collect(policy, [1], make_env=lambda: gym.make("rl_lora/Arithmetic-v0", disable_env_checker=True))
    assert group.env_id == "rl_lora/Arithmetic-v0"
    assert all(len(episode.turns) == 1 and episode.success is not None for episode in group.episodes)


def test_further_episodes_of_a_problem_are_those_of_a_larger_group(policy: Policy) -> None:
    (whole,) = worker(policy).play([EpisodeRequest("a", 7, 6)], random_seed=(1,))
    first, rest = worker(policy).play([EpisodeRequest("a", 7, 2), EpisodeRequest("a", 7, 4, first=2)], random_seed=(1,))
    assert [*first, *rest] == whole
    assert len({str(episode.turns) for episode in whole}) > 1


def test_an_answer_is_the_last_one_that_the_environment_reports(policy: Policy) -> None:
    class Answering(GuessEnv):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, info = super().step(action)
            answer = {"answer": f"answer {self.n}"} if self.n < 3 else {"answer": None}
            return observation, reward, terminated, truncated, info | answer

    (episodes,) = worker(policy, lambda: Answering(tries=4)).play([EpisodeRequest("a", 7, 8)])
    assert {episode.answer for episode in episodes} <= {"answer 1", "answer 2"}
    assert all(episode.answer == f"answer {min(2, len(episode.turns))}" for episode in episodes)
    assert worker(policy).play([EpisodeRequest("a", 7)])[0][0].answer is None
