"""The held-out problems of a run: when they are played, and what all processes together found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object

from rl_lora.config import TrainConfig
from rl_lora.metrics.summary import Evaluation
from rl_lora.policy.chat import Chat
from rl_lora.rollout.held_out import evaluate_adapters, held_out
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.protocol import Sampler


class HeldOutProblems:
    """Plays the same problems each time; every process its share.

    Args:
        rank, world: this process among all.
        limits: what else a `RolloutWorker` takes.
    """

    def __init__(
        self, config: TrainConfig, sampler: Sampler, chat: Chat, *, rank: int = 0, world: int = 1, **limits: Any
    ):
        self.config, self.rank, self.world = config, rank, world
        make_env, self.seeds = held_out(config.env, config.eval.env_kwargs, config.eval.episodes)
        self.worker = RolloutWorker(make_env, sampler, chat, config.rollout, **limits)

    def due(self, step: int) -> bool:
        """Whether they are played after a step: before the first one, every `eval.every`, and after the last one."""
        every, last = self.config.eval.every, step == self.config.steps
        return bool(self.seeds) and (step == 0 or last or (every > 0 and step % every == 0))

    def play(self, tags: Sequence[str | None], on_token: Callable[[int], None] | None = None) -> list[Evaluation]:
        """What each of the tags did, all in the same batches; the same on all processes."""
        shares = evaluate_adapters(
            self.worker,
            self.seeds[self.rank :: self.world],
            tags,
            temperature=self.config.eval.temperature,
            random_seed=self.config.seed,
            on_token=on_token,
        )
        place = {seed: i for i, seed in enumerate(self.seeds)}
        everything = [gather_object(list(share.problems)) for share in shares]
        return [
            Evaluation(share.adapter, tuple(sorted(problems, key=lambda episodes: place[episodes[0].seed])))
            for share, problems in zip(shares, everything, strict=True)
        ]

    def close(self) -> None:
        self.worker.close()
