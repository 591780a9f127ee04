"""Replies that are given instead of sampled: groups of one, for maximum likelihood by the same learner.

An environment shows how a problem is solved in `info["demonstration"]` of its `reset`; the reply is that text and the
token that ends a turn. No probability was drawn from: the behaviour log-probabilities are zero, and mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl_lora.config import RolloutConfig
from rl_lora.policy.chat import Chat
from rl_lora.rollout.contract import Env, close_env, env_id, reset_env
from rl_lora.rollout.worker import MakeEnv
from rl_lora.types import Episode, Group, Stop, Turn


class Demonstrations:
    """The demonstrations of an environment, as a source of groups."""

    has_rewards = False
    caption = "demonstrations of"
    reward_seconds = 0.0

    def __init__(
        self,
        make_env: MakeEnv,
        chat: Chat,
        config: RolloutConfig,
        *,
        context_length: int = 1 << 30,
        versions: Callable[[str], int] = lambda adapter: 0,
    ):
        self.make_env, self.chat, self.config = make_env, chat, config
        self.context_length, self.versions = context_length, versions
        self._env: Env | None = None

    def collect(
        self,
        seeds: Sequence[int],
        *,
        adapters: Sequence[str | None],
        n: int = 1,
        random_seed: tuple[int, ...] = (0,),
        temperature: float = 1.0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """The demonstration of every seed, for every adapter. Nothing is drawn: the other arguments are a sampler's.

        Raises:
            ValueError: the environment demonstrates nothing, or a demonstration does not fit the model's context.
        """
        assert n == 1, f"a problem has one demonstration, asked for {n}"
        return [self._group(seed, adapter) for adapter in adapters for seed in seeds]

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            close_env(self._env)
            self._env = None

    def _group(self, seed: int, adapter: str | None) -> Group:
        if self._env is None:
            self._env = self.make_env()
        name = env_id(self._env)
        start = reset_env(self._env, seed)
        text = start.info.get("demonstration")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{name}, seed {seed}, shows no solution to learn from: its reset() must give a text as "
                f"info['demonstration'], got {text!r} (rl_lora/Prompts-v0 makes one of the columns of its file: "
                "--env.kwargs.demonstration '{solution}')"
            )
        prompt_ids = tuple(self.chat.start(start.observation, self.config.system_prompt, start.messages))
        reply_ids = tuple(self.chat.reply(text))
        if len(prompt_ids) + len(reply_ids) > self.context_length:
            raise ValueError(
                f"{name}, seed {seed}: a prompt of {len(prompt_ids)} tokens and a demonstration of {len(reply_ids)} do "
                f"not fit the model's context of {self.context_length}"
            )
        turn = Turn(prompt_ids, reply_ids, (0.0,) * len(reply_ids), Stop.END, text)
        version = self.versions(adapter) if adapter is not None else 0
        episode = Episode(name, seed, (turn,), 1.0, Stop.END, adapter, version, observations=(start.observation,))
        return Group(name, seed, adapter, (episode,))
