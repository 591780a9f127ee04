"""Estimates from the samples of a model: pass@k, maj@k, 95 % intervals, and paired tests between two models.

Numbers in, numbers out. Outcomes may be fractions; everything is grouped by problem, because samples of one problem are
not independent. Not corrected here: the p-values of many comparisons at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
FLIPS = 10_000
"""Sign flips of a permutation test: p is known to +-0.004 at 0.05, and never below 1e-4."""

Interval = tuple[float, float]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased over samples (Chen et al. 2021, arXiv:2107.03374, eq. 1). Raises ValueError for k > n.
    """
    _check_k(n, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
    """Chance that the answer which most of k of these n samples give is right, over all C(n, k) choices of k.

    answers: of each sample, None where none could be read: those do not vote. right: 1 or 0 of each sample; an answer
    counts with the mean over its samples. Answers with equally many votes share the vote evenly, as if one of them were
    drawn; where nobody votes, nothing is right. Raises ValueError for k > n.
    """
    n = len(answers)
    _check_k(n, k)
    votes = Counter(answer for answer in answers if answer is not None)
    worth: dict[Hashable, float] = dict.fromkeys(votes, 0.0)
    for answer, value in zip(answers, right, strict=True):
        if answer is not None:
            worth[answer] += value / votes[answer]
    p = k / n  # of the choices of k of n independent ones: what is counted are probabilities, which do not overflow
    silent = _chosen(n - sum(votes.values()), k, p)
    chosen = {count: _chosen(count, k, p) for count in {*votes.values()}}
    total = 0.0
    for answer, value in worth.items():
        others = [count for other, count in votes.items() if other != answer]
        for most in range(1, min(k, votes[answer]) + 1) if value else ():
            # choices[t, s]: s samples of the others are chosen, none above `most` votes, t answers on a par with it
            choices = np.zeros((k // most + 1, k + 1))
            choices[0] = silent
            for count in others:
                further = np.zeros_like(choices)
                for i in range(min(most, count + 1)):
                    further[:, i:] += chosen[count][i] * choices[:, : k + 1 - i]
                further[1:, most:] += chosen[count][most] * choices[:-1, : k + 1 - most]
                choices = further
            shares = 1.0 / np.arange(1, len(choices) + 1)
            total += value * float(chosen[votes[answer]][most] * (shares @ choices[:, k - most]))
    return min(1.0, total / float(_chosen(n, k, p)[k]))


def wilson(successes: float, n: float, z: float = Z) -> Interval:
    """95 % interval of a proportion (Wilson 1927), for independent problems with one sample each."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(sums: Sequence[float], counts: Sequence[int], most: int | None = None) -> Interval:
    """95 % interval of a mean of outcomes in [0, 1] that come in G problems.

    sums, counts: per problem, of its outcomes. The standard error is that of a ratio, robust to any dependence within a
    problem (Miller 2024, arXiv:2411.00640, sec. 2.2):

        p = sum s_i / sum n_i,    SE^2 = G / (G - 1) * sum (s_i - p n_i)^2 / (sum n_i)^2.

    It enters Wilson's interval as an effective number of independent samples, m = p (1 - p) / SE^2 (Kish 1965), scaled
    by (z / t)^2 with G - 1 degrees of freedom (Korn & Graubard 1998). So the interval stays within [0, 1], and has a
    width where all problems agree: there m = G. m is no more than `most`, by default sum n_i: dependence that is
    negative in these data is taken for chance.
    """
    s, n = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    s, n = s[n > 0], n[n > 0]
    G, N = len(n), float(n.sum())
    if G < 2:
        return wilson(float(s.sum()) / max(1.0, N) * G, G)
    p = float(s.sum() / N)
    square = G / (G - 1) * float(((s - p * n) ** 2).sum()) / N**2
    if p <= 0 or p >= 1:
        m = float(G)
    else:
        m = min(p * (1 - p) / square if square > 0 else math.inf, N if most is None else most)
    m *= (Z / t_quantile(G - 1)) ** 2
    return wilson(p * m, m)


def paired_interval(differences: Sequence[float], n: int = 1) -> Interval:
    """95 % interval of the mean difference in accuracy of two models over the same problems.

    differences: per problem, each in [-1, 1]. n: samples a problem. Two problems are added, in which one sample more is
    right on either side, so that models without any difference have an interval, and a few problems do not promise too
    much. For one sample a problem this is exactly Bonett & Price (2012); for several the quantile is Student's.
    """
    d = np.append(np.asarray(differences, np.float64), (1 / n, -1 / n))
    half = (Z if n == 1 else t_quantile(len(d) - 1)) * float(d.std()) / math.sqrt(len(d))
    return max(-1.0, float(d.mean()) - half), min(1.0, float(d.mean()) + half)


def mcnemar(differences: Sequence[float]) -> float:
    """Exact two-sided p-value that two models are equally good, from one sample a problem (McNemar 1947).

    differences: per problem 1, 0 or -1. Under the hypothesis a problem that only one of them solves is either's with
    probability 1/2: the binomial distribution.
    """
    wins, losses = (sum(d == sign for d in differences) for sign in (1, -1))
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n))


def sign_flip(differences: NDArray[np.float64], seed: int = 0, flips: int = FLIPS) -> NDArray[np.float64]:
    """Two-sided p-values that two models are equally good, from any number of samples a problem.

    differences: (P, D), of P problems for D pairs of models; NaN where a pair has none. If the models are alike, each
    problem's difference may as well have the other sign (Fisher 1935): p is the share of random signs, and the observed
    ones among them, whose mean is as far from 0. Returns (D,).
    """
    d = np.nan_to_num(np.asarray(differences, np.float64))
    observed = np.abs(d.sum(0)) - 1e-9
    rng = np.random.default_rng(seed)
    reached = np.ones(d.shape[1])
    for start in range(0, flips, 1000):
        signs = 2.0 * rng.integers(0, 2, (min(1000, flips - start), len(d)), dtype=np.int8) - 1.0
        reached += (np.abs(signs @ d) >= observed).sum(0)
    return reached / (1 + flips)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's distribution, by its expansion at the normal one (Abramowitz & Stegun 26.7.5).

    To 0.1 % from 5 degrees of freedom on, and too small below.
    """
    z, v = Z, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def _chosen(count: int, k: int, p: float) -> NDArray[np.float64]:
    """(k + 1,): how probable it is that 0 ... k of `count` are chosen, each with probability p > 0."""
    if p == 1:
        return np.array([float(i == count) for i in range(k + 1)])
    odds = [
        math.log(math.comb(count, i)) + i * math.log(p) + (count - i) * math.log1p(-p) for i in range(min(count, k) + 1)
    ]
    return np.pad(np.exp(odds), (0, k + 1 - len(odds)))


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n={n}, the samples of a problem, got {k}")
