"""Figures of held-out samples: a row for each adapter, and the differences between rows.

The trainer's curve and the table of the `evaluate` command (`evaluator.py`) are made here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_lora.metrics.collapse import most_common_reply
from rl_lora.metrics.estimates import (
    Interval,
    clustered,
    majority_at_k,
    mcnemar,
    paired_interval,
    pass_at_k,
    sign_flip,
    wilson,
)
from rl_lora.metrics.records import Record, mean, summarize_samples
from rl_lora.metrics.samples import Sample, sample_of
from rl_lora.types import Episode


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one adapter (None: the base) on each held-out problem, unscorable ones too."""

    adapter: str | None
    problems: tuple[tuple[Episode, ...], ...]

    @property
    def record(self) -> Record:
        return summarize(self.samples())

    @property
    def score(self) -> float:
        """The figure that checkpoints are compared by: accuracy, or else the mean reward."""
        record = self.record
        value = record["reward"] if record["accuracy"] is None else record["accuracy"]
        return -math.inf if value is None else float(value)

    def samples(self) -> list[Sample]:
        """One flat record an episode; problems are told apart by their seeds."""
        return [
            sample_of(episode, k, problem=episode.seed)
            for episodes in self.problems
            for k, episode in enumerate(episodes)
        ]


def summarize(samples: Sequence[Sample]) -> Record:
    """Means over scorable samples, as `metrics.summarize_samples` has them, and:

    episodes: how many are scorable.
    accuracy_low, accuracy_high, where there are verdicts: 95 %, Wilson's for one sample a problem, else clustered.
    format: mean of the reward's part of that name, or else the share of samples with an answer that could be read; None
    where there is neither.
    same_reply: the share of the most common reply; None for few or equal problems (`collapse.most_common_reply`).
    """
    scored = [sample for sample in samples if not sample["unscorable"]]
    reasons = [sample.get("reason") or "no reason given" for sample in samples if sample["unscorable"]]
    record = summarize_samples(scored, len(reasons), reasons)
    record["episodes"] = len(scored)
    answered = mean([float(sample["answer"] is not None) for sample in scored]) if has_answers(samples) else None
    record["format"] = record.get("parts/format", answered)
    common = most_common_reply(samples)
    record["same_reply"] = None if common is None else common[1]
    if record["accuracy"] is not None:
        verdicts = list(_verdicts(samples).values())
        low, high = _interval([sum(v) for v in verdicts], [len(v) for v in verdicts])
        record["accuracy_low"], record["accuracy_high"] = low, high
    return record


def table_row(samples: Sequence[Sample], ks: Sequence[int]) -> Record:
    """`summarize`, and pass@k and maj@k with their intervals, by k as text.

    Both are means over the problems that have at least k verdicts; maj@k where the environment reports answers.
    """
    record = summarize(samples)
    record |= {"n_samples": len(samples), "n_problems": len({sample["problem"] for sample in samples})}
    verdicts, answers = _verdicts(samples), _answers(samples)
    record["pass"], record["majority"] = {}, {}
    for k in ks:
        enough = [problem for problem, outcomes in verdicts.items() if len(outcomes) >= k]
        n = sum(len(verdicts[problem]) for problem in enough)
        passed = [pass_at_k(len(verdicts[p]), int(sum(verdicts[p])), k) for p in enough]
        if enough:
            record["pass"][str(k)] = _mean_with_interval(passed, n)
        if enough and k > 1 and has_answers(samples):
            voted = [majority_at_k(answers[p], verdicts[p], k) for p in enough]
            record["majority"][str(k)] = _mean_with_interval(voted, n)
    return record


def has_answers(samples: Sequence[Sample]) -> bool:
    """Whether the environment says what it took for the answer."""
    return any(sample["answer"] is not None for sample in samples)


def pairs(rows: Sequence[Sequence[Sample]], n: int, seed: int = 0) -> list[list[Record | None]]:
    """Differences in accuracy, row i minus row j, over the problems on which both have verdicts; None where there are
    none, and on the diagonal.

    difference, low, high: the mean over problems, and its 95 % interval (`estimates.paired_interval`). p: exact McNemar
    for one sample a problem, else by sign flips, which `seed` fixes.
    """
    accuracy = [{problem: float(np.mean(v)) for problem, v in _verdicts(samples).items()} for samples in rows]
    problems = list(dict.fromkeys(problem for of_row in accuracy for problem in of_row))
    per_problem = np.array([[a.get(p, math.nan) for a in accuracy] for p in problems]).reshape(-1, len(rows))
    which = list(itertools.combinations(range(len(rows)), 2))
    differences = np.stack([per_problem[:, i] - per_problem[:, j] for i, j in which], 1) if which else per_problem
    p_values = sign_flip(differences, seed) if n > 1 else None
    matrix: list[list[Record | None]] = [[None] * len(rows) for _ in rows]
    for place, (i, j) in enumerate(which):
        d = differences[~np.isnan(differences[:, place]), place]
        if not len(d):
            continue
        p = mcnemar(d.tolist()) if p_values is None else float(p_values[place])
        low, high = paired_interval(d.tolist(), n)
        matrix[i][j] = {"difference": float(d.mean()), "low": low, "high": high, "p": p}
        matrix[j][i] = {"difference": float(-d.mean()), "low": -high, "high": -low, "p": p}
    return matrix


def change(before: Sequence[Sample], after: Sequence[Sample]) -> Record | None:
    """The change by training on the same problems, one sample each: an entry of `pairs`, after minus before; None where
    there are no verdicts."""
    return pairs([after, before], n=1)[0][1]


def compared(pair: Record | None) -> Record | None:
    """An entry of `pairs` as part of a row."""
    return None if pair is None else {"value": pair["difference"], **{x: pair[x] for x in ("low", "high", "p")}}


def _judged(samples: Sequence[Sample]) -> Mapping[Any, list[Sample]]:
    """The samples with a verdict, by problem."""
    found: dict[Any, list[Sample]] = {}
    for sample in samples:
        if not sample["unscorable"] and sample["success"] is not None:
            found.setdefault(sample["problem"], []).append(sample)
    return found


def _verdicts(samples: Sequence[Sample]) -> dict[Any, list[float]]:
    return {problem: [float(s["success"]) for s in of_problem] for problem, of_problem in _judged(samples).items()}


def _answers(samples: Sequence[Sample]) -> dict[Any, list[str | None]]:
    return {problem: [s["answer"] for s in of_problem] for problem, of_problem in _judged(samples).items()}


def _interval(sums: Sequence[float], counts: Sequence[int], most: int | None = None) -> Interval:
    if len(counts) == sum(counts) == (sum(counts) if most is None else most):
        return wilson(sum(sums), len(counts))
    return clustered(sums, counts, most)


def _mean_with_interval(values: Sequence[float], n_samples: int) -> Record:
    low, high = _interval(values, [1] * len(values), n_samples)
    return {"value": float(np.mean(values)), "low": low, "high": high}
