"""Which problems a step plays where there is a finite list of them: more of those whose success rate is near one half.

The problems are seeds, and nothing else is known of them: an environment with `n_problems` = n leads n seeds in a row,
from a multiple of n on, to n different ones. Nothing is played here; the trainer says what came of the problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from rl_lora.config import TrainConfig
from rl_lora.metrics.records import Record, mean
from rl_lora.rollout.contract import close_env, env_id
from rl_lora.rollout.environments import environment
from rl_lora.types import Group

SEED_STRIDE = 1_000_003
"""Distance between the first training problems of two runs whose seeds are neighbours."""
UNTRIED = 1 / 6
"""Mean of p (1 - p) for p uniform in [0, 1]: the value of a problem that was never played."""


class Trial(NamedTuple):
    """The record of a problem: discounted counts, and the step in which it was last played."""

    successes: float
    failures: float
    step: int


class Curriculum:
    """Chooses the problems of every step, and remembers how they went.

    At least the share `explore` of a step's problems are those that were played longest ago, untried ones first: every
    problem's turn comes. The others are drawn from the problems in reach. What a problem teaches is measured by the
    variance of its verdict, p (1 - p) ("sampling for learnability": Foster et al., arXiv:2502.12272), here by its mean
    a b / ((a + b) (a + b + 1)) over the posterior Beta(a, b) of the success rate p, with a = 1 + successes and
    b = 1 + failures. Of an untried problem that is 1/6; a problem is in reach if it has more, and is drawn in
    proportion to what it has more. Where too few are in reach, the next of the others take their places. The counts
    halve in `half_life` steps: the policy that they are of has gone. The mixture of what teaches and what is out of
    date is that of prioritized level replay (Jiang et al., arXiv:2010.03934).

    Args:
        n_problems: the seeds `first` to `first + n_problems - 1` are the problems.
        n: problems of a step; n_spare: those that may replace some of them.

    Raises:
        ValueError: there are fewer problems than one step takes.
    """

    def __init__(
        self, n_problems: int, *, n: int, n_spare: int = 0, explore: float, half_life: float, seed: int = 0
    ) -> None:
        if n_problems < n + n_spare:
            raise ValueError(
                f"a curriculum chooses among more problems than a step takes: rollout.prompts_per_step={n} and "
                f"rollout.max_replaced={n_spare} need {n + n_spare}, there are {n_problems}"
            )
        self.n_problems, self.n, self.n_spare = n_problems, n, n_spare
        self.explore, self.half_life, self.seed = explore, half_life, seed
        self.first = seed * SEED_STRIDE // n_problems * n_problems
        self.trials: dict[int, Trial] = {}
        """The record of each problem that was played, by seed."""

    @property
    def seeds(self) -> range:
        """The seeds of all problems."""
        return range(self.first, self.first + self.n_problems)

    def choose(self, step: int) -> tuple[list[int], list[int]]:
        """The problems of a step, and those that may replace some of them: the same answer in every process."""
        rng = np.random.default_rng((self.seed, step))
        gains = {seed: gain for seed in sorted(self.trials) if (gain := self._gain(seed, step)) > 0}
        n_again = min(self.n - math.ceil(self.explore * self.n), len(gains))
        odds = np.array(list(gains.values())) / (sum(gains.values()) or 1.0)
        again = rng.choice(list(gains), n_again, replace=False, p=odds).tolist() if n_again else []
        chosen = set(again)
        rest = [seed for seed in self._stalest_first() if seed not in chosen]
        n_rest = self.n - len(again)
        # shuffled, so that the updates of a step, and the processes, have their share of both kinds
        problems = [int(seed) for seed in rng.permutation(again + rest[:n_rest])]
        return problems, rest[n_rest : n_rest + self.n_spare]

    def observe(self, step: int, groups: Iterable[Group]) -> Record:
        """Remember how the groups of a step went, those of all processes. Returns what they were chosen on.

        `curriculum/tried`: the share of all problems that were played before this step; `curriculum/revisited`: that
        share of the step's groups; `curriculum/success_rate`: the success rate that was expected of these, None where
        there are none.

        Raises:
            ValueError: the environment gives no verdict.
        """
        groups = list(groups)
        known = [self._discounted(group.seed, step) for group in groups if group.seed in self.trials]
        record: Record = {
            "curriculum/tried": len(self.trials) / self.n_problems,
            "curriculum/revisited": len(known) / len(groups),
            "curriculum/success_rate": mean([(1 + t.successes) / (2 + t.successes + t.failures) for t in known]),
        }
        for group in groups:
            verdicts = [episode.success for episode in group.episodes]
            if None in verdicts:
                raise ValueError(
                    f"rollout.curriculum=success_rate needs a verdict of each episode, but {group.env_id} gives none: "
                    "its step() must put a bool into info['is_success'] (of a reward: a rewards.Score with success)"
                )
            n_solved = float(sum(map(bool, verdicts)))
            old = self._discounted(group.seed, step)
            self.trials[group.seed] = Trial(old.successes + n_solved, old.failures + len(verdicts) - n_solved, step)
        return record

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON."""
        return {str(seed): list(trial) for seed, trial in self.trials.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state that `state` returned."""
        self.trials = {int(seed): Trial(*trial) for seed, trial in state.items()}

    def _gain(self, seed: int, step: int) -> float:
        """The expected p (1 - p) of a problem beyond an untried one's."""
        trial = self._discounted(seed, step)
        a, b = 1 + trial.successes, 1 + trial.failures
        return a * b / ((a + b) * (a + b + 1)) - UNTRIED

    def _discounted(self, seed: int, step: int) -> Trial:
        trial = self.trials.get(seed, Trial(0.0, 0.0, step))
        weight = 0.5 ** ((step - trial.step) / self.half_life)
        return Trial(weight * trial.successes, weight * trial.failures, trial.step)

    def _stalest_first(self) -> list[int]:
        untried = [seed for seed in self.seeds if seed not in self.trials]
        return untried + sorted(self.trials, key=lambda seed: (self.trials[seed].step, seed))


def curriculum_of(config: TrainConfig) -> Curriculum | None:
    """The curriculum that a run asks for, or None.

    Raises:
        ValueError: the environment's problems are no finite list, or fewer than a step takes.
    """
    r = config.rollout
    if r.curriculum == "none":
        return None
    env = environment(config.env)()
    name, n_problems = env_id(env), getattr(env.unwrapped, "n_problems", None)
    close_env(env)
    if n_problems is None:
        raise ValueError(
            f"rollout.curriculum={r.curriculum} needs an environment with a finite list of problems, but {name} makes "
            "new ones from every seed (it has no n_problems); set rollout.curriculum to none"
        )
    return Curriculum(
        int(n_problems),
        n=r.prompts_per_step,
        n_spare=r.max_replaced,
        explore=r.curriculum_explore,
        half_life=r.curriculum_half_life,
        seed=config.seed,
    )
