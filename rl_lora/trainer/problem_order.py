"""Which problems a run trains on, step by step: seeds in their order, or all that a curriculum may choose from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rl_lora.config import TrainConfig
from rl_lora.rollout.curriculum import SEED_STRIDE, curriculum_of


def training_problems(config: TrainConfig) -> Iterator[int]:
    """The seeds of a run, in their order; with a curriculum, all that it may choose from. `config` is valid."""
    if (curriculum := curriculum_of(config)) is not None:
        yield from curriculum.seeds
    else:
        yield from itertools.chain.from_iterable(problem_seeds(config, step) for step in range(config.steps))


def problem_seeds(config: TrainConfig, step: int) -> list[int]:
    """The training problems of a step: consecutive seeds, so that a finite environment is gone through in epochs.

    Below 2^32, which is all that some random generators take, as long as the run's seed is below 3,000.
    """
    return _seeds(config, step)[: config.rollout.prompts_per_step]


def fresh_seeds(config: TrainConfig, step: int) -> list[int]:
    """Problems that may take the place of others in a step; those that are not needed are passed over."""
    return _seeds(config, step)[config.rollout.prompts_per_step :]


def _seeds(config: TrainConfig, step: int) -> list[int]:
    n = config.rollout.prompts_per_step + config.rollout.max_replaced
    return [config.seed * SEED_STRIDE + step * n + i for i in range(n)]
