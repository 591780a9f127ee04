"""The groups of a step: this process's share of its problems, played, shaped, and replaced where they teach nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rl_lora.config import TrainConfig
from rl_lora.learner.advantages import advantages, shuffle_rewards
from rl_lora.rollout.curriculum import Curriculum
from rl_lora.rollout.shaping import shaped
from rl_lora.rollout.source import GroupSource
from rl_lora.settings.algorithm import advantage_of
from rl_lora.trainer.problem_order import fresh_seeds, problem_seeds
from rl_lora.types import Group


class Collector:
    """Collects groups from a source.

    Args:
        curriculum: chooses the problems; None: they come in their order.
        tags: of the trainables that the groups are for.
        rank, world: this process among all.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: GroupSource,
        curriculum: Curriculum | None,
        tags: Sequence[str | None],
        *,
        rank: int,
        world: int,
        on_token: Callable[[int], None] | None = None,
    ):
        self.config, self.source, self.curriculum, self.tags = config, source, curriculum, list(tags)
        self.rank, self.world, self.on_token = rank, world, on_token

    def collect(self, step: int) -> tuple[list[Group], list[Group]]:
        """This process's share of the step's groups, and all that were sampled: those that were replaced too.

        Every update learns from the same groups, however many processes there are, unless groups are replaced: each
        process has its share of the replacements.
        """
        updates = self.config.learner.updates_per_step
        if self.curriculum is not None:
            seeds, fresh = self.curriculum.choose(step)
        else:
            seeds, fresh = problem_seeds(self.config, step), fresh_seeds(self.config, step)
        fresh = fresh[self.rank :: self.world]
        deal = np.random.default_rng((self.config.seed, step, self.rank))
        share = [seed for i, seed in enumerate(seeds) if i // updates % self.world == self.rank]
        groups = self._play(step, share, deal)
        sampled = list(groups)
        estimator = advantage_of(self.config.learner)
        while fresh and (silent := [i for i, group in enumerate(groups) if advantages(group, estimator) is None]):
            more = self._play(step, fresh[: len(silent)], deal)
            fresh = fresh[len(more) :]
            for i, group in zip(silent, more, strict=False):
                groups[i] = group
            sampled += more
        return groups, sampled

    def _play(self, step: int, seeds: list[int], deal: np.random.Generator) -> list[Group]:
        groups = self.source.collect(
            seeds,
            adapters=self.tags,
            n=self.config.rollout.group_size,
            random_seed=(self.config.seed, step),
            temperature=self.config.rollout.temperature,
            on_token=self.on_token,
        )
        groups = [shaped(group, self.config.rollout) for group in groups]
        return shuffle_rewards(groups, deal) if self.config.shuffle_rewards else groups
