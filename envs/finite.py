"""Environments with a finite list of problems, gone through in epochs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rl_lora.envs.text import Problem, SingleTurnEnv
from rl_lora.rewards import RewardSpec


class FiniteEnv(SingleTurnEnv):
    """Seed s leads to problem (s mod n) of a permutation that belongs to epoch s // n.

    So n seeds in a row, from a multiple of n on, visit each of the n problems once. A subclass sets `problems`.
    """

    def __init__(self, reward: RewardSpec) -> None:
        super().__init__(reward)
        self.problems: Sequence[Problem] = ()

    @property
    def n_problems(self) -> int:
        return len(self.problems)

    def problem(self, seed: int) -> Problem:
        epoch, place = divmod(seed, len(self.problems))
        return self.problems[int(_permutation(len(self.problems), epoch)[place])]


@functools.lru_cache(maxsize=16)
def _permutation(n: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(epoch).permutation(n)
