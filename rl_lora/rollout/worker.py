"""Playing environments: G episodes of one seed form a `Group`.

Any gymnasium environment is played whose actions are texts, and whose observations are texts, which are a user's
messages, or messages with roles; an episode begins with those that `reset(seed=...)` returns. From the info dictionary
of `step` are read, where present:
`is_success` (bool): the verdict, apart from the reward, which may be shaped.
`reward_parts` (dict[str, float]): summed over the turns and averaged in the metrics.
`unscorable` (a reason): the episode could not be judged; it is left out of its group, and counted.
`answer` (str): what was judged, in one spelling: equal answers are votes for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from rl_lora.config import EpisodeConfig
from rl_lora.policy.chat import Chat
from rl_lora.rollout.calls import CallPool
from rl_lora.rollout.contract import Env, ResetResult, StepResult, TaskError, close_env, env_id, reset_env
from rl_lora.rollout.failures import Failures
from rl_lora.rollout.observations import shown
from rl_lora.rollout.steps import Steps
from rl_lora.sampler.protocol import Completion, Later, Request, Sampler
from rl_lora.types import Episode, Group, Stop, Turn

MakeEnv = Callable[[], Env]


class EpisodeRequest(NamedTuple):
    """n episodes of one problem under one adapter; `first` others of it have been played elsewhere."""

    adapter: str | None
    seed: int
    n: int = 1
    first: int = 0


@dataclass
class _RunningEpisode:
    """One episode in the making."""

    env: Env
    env_id: str
    seed: int
    adapter: str | None
    version: int
    k: int
    """The episode's place in the group."""
    prompt_ids: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    identity: tuple[str, ...] = ()
    """The same in all episodes of a group: `ResetResult.identity`."""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    success: bool | None = None
    answer: str | None = None
    stop: Stop | None = None
    unscorable: str | None = None
    failed: bool = False

    def episode(self) -> Episode:
        assert self.stop is not None
        return Episode(
            env_id=self.env_id,
            seed=self.seed,
            turns=tuple(self.turns),
            reward=self.reward,
            stop=self.stop,
            adapter=self.adapter,
            version=self.version,
            success=self.success,
            reward_parts=self.parts,
            observations=tuple(self.observations),
            answer=self.answer,
            unscorable=self.unscorable,
            failed=self.failed,
        )


class RolloutWorker:
    """Environments x sampler -> groups.

    Args:
        make_env: called as often as episodes are played at a time; the environments are kept and reset.
        versions: the version of an adapter at the moment, for the record.
        on_failure: told the first episode that fails, while the run goes on; see `failures.Failures`.

    Its methods raise TaskError where too many episodes fail, and where a seed does not lead to one problem.
    """

    has_rewards = True
    caption = "sampled in"

    def __init__(
        self,
        make_env: MakeEnv,
        sampler: Sampler,
        chat: Chat,
        config: EpisodeConfig,
        *,
        context_length: int = 1 << 30,
        versions: Callable[[str], int] = lambda adapter: 0,
        on_failure: Callable[[TaskError], None] = lambda error: None,
    ):
        self.make_env, self.sampler, self.chat, self.config = make_env, sampler, chat, config
        self.context_length, self.versions = context_length, versions
        self.failures = Failures(config.max_failed, on_failure)
        self.calls = CallPool(config.reward_threads)
        self.reward_seconds = 0.0
        """Seconds that sampling has waited for environments and their rewards."""
        self._envs: list[Env] = []

    def collect(
        self,
        seeds: Sequence[int],
        *,
        adapters: Sequence[str | None],
        n: int,
        random_seed: tuple[int, ...] = (0,),
        temperature: float = 1.0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """n episodes of every seed under every adapter, all in the same batches; groups by adapter, then by seed.

        `random_seed` and the problem's seed fix what is drawn: the same call gives the same groups.
        """
        wanted = [EpisodeRequest(adapter, seed, n) for adapter in adapters for seed in seeds]
        played = self.play(wanted, random_seed=random_seed, temperature=temperature, on_token=on_token)
        return [group_of(episodes) for episodes in played]

    def play(
        self,
        wanted: Sequence[EpisodeRequest],
        *,
        random_seed: tuple[int, ...] = (0,),
        temperature: float = 1.0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[Episode]]:
        """The episodes of each entry of `wanted`, unscorable ones too, all in the same batches; see `collect`."""
        while len(self._envs) < sum(plays.n for plays in wanted):
            self._envs.append(self.make_env())
        envs = iter(self._envs)
        self.failures.begin([plays.n for plays in wanted])
        starts = [[self._reset(next(envs), w.seed) for _ in range(w.n)] for w in wanted]
        groups = [
            [self._begin(env, w.seed, w.adapter, k, start) for k, (env, start) in enumerate(of_group, w.first)]
            for w, of_group in zip(wanted, starts, strict=True)
        ]
        first_of = {id(play): w.first for w, group in zip(wanted, groups, strict=True) for play in group}
        for group in groups:
            check_one_problem(group)
        plays = [play for group in groups for play in group if play.stop is None]
        requests: dict[tuple[Any, ...], list[_RunningEpisode]] = {}
        for play in plays:
            requests.setdefault((play.adapter, play.seed, play.prompt_ids), []).append(play)

        def request(play: _RunningEpisode, n: int) -> Request:
            first = 0 if play.turns else first_of[id(play)]  # later turns have a seed of their own for each k
            return Request(
                prompt_ids=play.prompt_ids,
                n=n,
                max_tokens=self.config.max_tokens,
                temperature=temperature,
                adapter=play.adapter,
                seed=(*random_seed, play.seed % (1 << 64), len(play.turns), play.k - first),
                first=first,
            )

        same = list(requests.values())

        steps = Steps(groups, self.calls, self.config, self._take)

        def follow(i: int, k: int, reply: Completion) -> Request | Later | None:
            play = same[i][k]
            text = self.chat.decode(reply.token_ids)
            play.turns.append(Turn(play.prompt_ids, reply.token_ids, reply.logprobs, reply.stop, text))
            return steps.reply(play, lambda: request(play, 1) if play.stop is None else None)

        if same:
            self.sampler.generate([request(plays[0], len(plays)) for plays in same], on_token, follow)
        steps.finish(plays)
        self.reward_seconds += steps.seconds
        self.failures.end()
        return [[play.episode() for play in group] for group in groups]

    def close(self) -> None:
        """Close the environments."""
        while self._envs:
            close_env(self._envs.pop())

    def first_prompt(self, seed: int) -> list[int]:
        """The prompt of a problem, in tokens. Raises TaskError if the problem cannot be played."""
        if not self._envs:
            self._envs.append(self.make_env())
        env = self._envs[0]
        return list(prompt_of(env, seed, reset_env(env, seed), self.chat, self.config, self.context_length))

    def _reset(self, env: Env, seed: int) -> tuple[Env, Future[ResetResult]]:
        """Begin to reset an environment: those that wait do so together."""
        return env, self.calls.start(("reset", type(env.unwrapped)), partial(reset_env, env, seed))

    def _begin(self, env: Env, seed: int, adapter: str | None, k: int, reset: Future[ResetResult]) -> _RunningEpisode:
        version = self.versions(adapter) if adapter is not None else 0
        play = _RunningEpisode(env, env_id(env), seed, adapter, version, k)
        try:
            start = reset.result()
            play.observations.append(start.observation)
            play.identity = start.identity
            play.prompt_ids = prompt_of(env, seed, start, self.chat, self.config, self.context_length)
        except TaskError as error:
            self._fail(play, error)
        return play

    def _fail(self, play: _RunningEpisode, error: TaskError) -> None:
        """Leave an episode out. Raises TaskError where too many have failed."""
        self.failures.add(error)
        play.stop, play.unscorable, play.failed = Stop.UNSCORABLE, error.reason, True

    def _take(self, play: _RunningEpisode, step: Callable[[], StepResult]) -> None:
        """Take down the result of a step, and the next prompt, where the episode goes on."""
        try:
            outcome = step()
        except TaskError as error:
            return self._fail(play, error)
        play.reward += outcome.reward
        play.success = outcome.success if outcome.success is not None else play.success
        play.answer = outcome.answer if outcome.answer is not None else play.answer
        for name, value in outcome.reward_parts.items():
            play.parts[name] = play.parts.get(name, 0.0) + value
        if outcome.unscorable is not None:
            play.stop, play.unscorable = Stop.UNSCORABLE, outcome.unscorable
        elif outcome.terminated:
            play.stop = Stop.END
        elif outcome.truncated or len(play.turns) >= self.config.max_turns:
            play.stop = Stop.LENGTH
        else:
            play.observations.append(outcome.observation)
            said, asked = play.turns[-1].completion_ids, outcome.messages or outcome.observation
            try:
                play.prompt_ids = tuple(self.chat.extend(play.prompt_ids, said, asked))
            except ValueError as error:  # the chat template refuses it
                return self._fail(play, TaskError(f"{play.env_id}, seed {play.seed}: {error}", str(error)))
            if len(play.prompt_ids) + self.config.max_tokens > self.context_length:
                play.stop = Stop.LENGTH  # the conversation has outgrown the model


def prompt_of(
    env: Env, seed: int, start: ResetResult, chat: Chat, config: EpisodeConfig, context_length: int
) -> tuple[int, ...]:
    """The tokens that a problem begins with. Raises TaskError if they leave no room for a reply."""
    try:
        prompt_ids = tuple(chat.start(start.observation, config.system_prompt, start.messages))
    except ValueError as error:  # the chat template refuses it
        raise TaskError(f"{env_id(env)}, seed {seed}: {error}", str(error)) from error
    room = context_length - config.max_tokens
    if len(prompt_ids) > room:
        raise TaskError(
            f"the prompt of {env_id(env)}, seed {seed}, has {len(prompt_ids)} tokens, but the model's context of "
            f"{context_length} leaves {room} beside rollout.max_tokens={config.max_tokens}; "
            "shorten the prompt or lower max_tokens",
            "the prompt does not fit the model's context",
        )
    return prompt_ids


def check_one_problem(plays: Sequence[_RunningEpisode]) -> None:
    """Raises TaskError unless the episodes of a seed are of one problem: only then is their mean a baseline."""
    found = [play.identity for play in plays if play.identity]
    if other := next((identity for identity in found if identity != found[0]), None):
        raise nondeterministic(plays[0].env_id, plays[0].seed, found[0], other)


def nondeterministic(name: str, seed: int, first: Sequence[str], second: Sequence[str]) -> TaskError:
    """The error of a seed that led to two problems, given by their `ResetResult.identity`."""
    kinds = ("", "the messages ", "the reference ")
    kind, one, other = next(found for found in zip(kinds, first, second, strict=True) if found[1] != found[2])
    return TaskError(
        f"{name}, seed {seed}, is another problem each time: {kind}{shown(one)} and {shown(other)}; the episodes of a "
        "seed are compared with each other, so reset(seed=...) must always lead to the same problem: draw at random "
        "from random.Random(seed) or numpy.random.default_rng(seed), and not from what earlier episodes left behind",
        "a seed that is another problem each time",
        stops=True,
    )


def group_of(episodes: Sequence[Episode]) -> Group:
    """The group of episodes of one problem; unscorable ones are counted and left out."""
    scored = tuple(episode for episode in episodes if episode.stop is not Stop.UNSCORABLE)
    reasons = tuple(episode.unscorable or "" for episode in episodes if episode.stop is Stop.UNSCORABLE)
    return Group(episodes[0].env_id, episodes[0].seed, episodes[0].adapter, scored, len(reasons), reasons)
