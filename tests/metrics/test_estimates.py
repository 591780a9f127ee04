"""The promises of `estimates.py`: what the formulas claim, against counting, scipy, and simulated evaluations."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rl_lora.metrics.estimates import (
    clustered,
    majority_at_k,
    mcnemar,
    paired_interval,
    pass_at_k,
    sign_flip,
    t_quantile,
    wilson,
)

EVALUATIONS = 2000
"""Simulated ones: the share that an honest 95 % interval covers is then known to +-1 point."""


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_the_choices_of_k_that_hold_a_right_one(n: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            chosen = [any(choice) for choice in itertools.combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_k_is_unbiased_over_samples() -> None:
    p, n, k = 0.2, 6, 3
    expected = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_no_k_beyond_the_samples(k: int) -> None:
    for estimate in (lambda: pass_at_k(4, 2, k), lambda: majority_at_k(["a"] * 4, [1.0] * 4, k)):
        with pytest.raises(ValueError, match=f"k must be from 1 to n=4, the samples of a problem, got {k}"):
            estimate()


@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8),
    st.sets(st.sampled_from(["a", "b", "c"])),
    st.data(),
)
def test_majority_at_k_is_the_mean_over_the_choices_of_k(
    answers: list[str | None], solutions: set[str], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    found = []
    for choice in itertools.combinations(answers, k):
        votes = Counter(answer for answer in choice if answer is not None)
        winners = [answer for answer in votes if votes[answer] == max(votes.values())]
        found.append(sum(answer in solutions for answer in winners) / max(1, len(winners)))
    right = [float(answer in solutions) for answer in answers]
    assert majority_at_k(answers, right, k) == pytest.approx(np.mean(found), abs=1e-9)


def test_a_majority_of_many_samples_is_computed_in_moments() -> None:
    answers = [str(i % 11) for i in range(128)]
    value = majority_at_k(answers, [float(a == "0") for a in answers], 64)
    assert 0 < value < 1
    assert majority_at_k(["7"] * 100 + ["8"] * 99, [1.0] * 100 + [0.0] * 99, 199) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2, 599, 600, 1200])
def test_a_majority_of_a_thousand_samples_and_more_is_a_number(k: int) -> None:
    n, right = 1200, 640
    answers = ["7"] * right + ["8"] * (n - right)
    won = [Fraction(math.comb(right, i) * math.comb(n - right, k - i), math.comb(n, k)) for i in range(k + 1)]
    expected = sum(share * (1 if 2 * i > k else Fraction(1, 2) if 2 * i == k else 0) for i, share in enumerate(won))
    assert majority_at_k(answers, [1.0] * right + [0.0] * (n - right), k) == pytest.approx(float(expected), abs=1e-9)
    alone = majority_at_k(["7", *[None] * (n - 1)], [1.0] + [0.0] * (n - 1), k)
    assert alone == pytest.approx(k / n, abs=1e-9)  # it wins where it is among them


def test_an_answer_counts_as_its_samples_were_judged() -> None:
    assert majority_at_k(["7", "7", "8"], [1.0, 0.0, 0.0], 3) == pytest.approx(0.5)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (113, 256), (3, 4), (0, 1), (1, 1)])
def test_the_interval_holds_the_proportions_that_the_score_test_accepts(successes: int, n: int) -> None:
    p = np.linspace(0, 1, 200_001)[1:-1]
    accepted = p[np.abs(successes / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n)]
    low, high = wilson(successes, n)
    assert low == pytest.approx(0.0 if successes == 0 else accepted.min(), abs=1e-5)
    assert high == pytest.approx(1.0 if successes == n else accepted.max(), abs=1e-5)


def test_the_interval_stays_between_0_and_1_and_is_all_of_it_without_data() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 60):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0.0 <= low <= successes / n + 1e-12
            assert successes / n - 1e-12 <= high <= 1.0


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.3, 2000)
    covered = [low <= 0.3 <= high for low, high in (wilson(int(k), 200) for k in draws)]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 17), (113, 256), (10, 10)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_quantile_is_students() -> None:
    for degrees in (*range(5, 40), 100, 1000):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)
        assert t_quantile(degrees) <= stats.t.ppf(0.975, degrees) * (1 + 1e-6)


def share_covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize(
    ("problems", "n", "accuracy", "spread"),
    [(100, 4, 0.3, 2.0), (50, 8, 0.5, 0.5), (200, 16, 0.6, 5.0), (100, 4, 0.9, 3.0), (60, 4, 0.5, 1e6)],
)
def test_the_clustered_interval_covers_the_truth_in_93_to_97_evaluations_of_100(
    problems: int, n: int, accuracy: float, spread: float
) -> None:
    rng = np.random.default_rng(problems + n)
    difficulty = rng.beta(accuracy * spread, (1 - accuracy) * spread, (EVALUATIONS, problems))
    counts = [n] * problems
    assert 0.93 < share_covered([clustered(c, counts) for c in rng.binomial(n, difficulty)], accuracy) < 0.97


def test_an_interval_that_takes_samples_for_problems_would_not_cover() -> None:
    rng = np.random.default_rng(0)
    c = rng.binomial(16, rng.beta(0.6, 0.6, (EVALUATIONS, 100)))
    assert share_covered([wilson(int(x.sum()), 1600) for x in c], 0.5) < 0.6
    assert share_covered([clustered(x, [16] * 100) for x in c], 0.5) > 0.93


def test_the_interval_of_pass_at_k_covers_it() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.beta(0.5, 1.5, (EVALUATIONS, 100))
    truth = 1 - float(np.mean((1 - np.random.default_rng(2).beta(0.5, 1.5, 10**6)) ** 4))
    value = np.array([pass_at_k(8, c, 4) for c in range(9)])
    intervals = [clustered(v, [1] * 100, 800) for v in value[rng.binomial(8, difficulty)]]
    assert 0.93 < share_covered(intervals, truth) < 0.97


def test_the_clustered_interval_is_wilsons_but_for_estimating_the_deviation() -> None:
    outcomes = [1.0] * 300 + [0.0] * 700
    assert clustered(outcomes, [1] * 1000) == pytest.approx(wilson(300, 1000), abs=2e-4)


def test_problems_that_all_agree_leave_doubt() -> None:
    for right in (0, 1):
        low, high = clustered([8.0 * right] * 30, [8] * 30)
        assert (low, high) == pytest.approx(wilson(30 * right, 30), abs=0.02)
    assert clustered([4.0] * 30, [8] * 30)[1] - clustered([4.0] * 30, [8] * 30)[0] > 0.1  # as if independent
    assert clustered([], []) == (0.0, 1.0)
    assert clustered([3.0], [4]) == wilson(0.75, 1)


def test_problems_without_a_verdict_say_nothing() -> None:
    assert clustered([1.0, 0.0, 2.0, 0.0], [2, 0, 2, 2]) == clustered([1.0, 2.0, 0.0], [2, 2, 2])


@pytest.mark.parametrize(
    ("problems", "n", "a", "b"),
    [(50, 1, 0.3, 0.4), (200, 1, 0.1, 0.12), (1000, 1, 0.45, 0.5), (100, 4, 0.4, 0.5), (100, 16, 0.45, 0.5)],
)
def test_the_interval_of_a_difference_covers_it_in_93_to_97_evaluations_of_100(
    problems: int, n: int, a: float, b: float
) -> None:
    rng = np.random.default_rng(problems + n)
    difficulty = rng.random((EVALUATIONS, problems))  # shared by both models, whose chances are 2 a u and 2 b u
    differences = (rng.binomial(n, 2 * b * difficulty) - rng.binomial(n, 2 * a * difficulty)) / n
    assert 0.93 < share_covered([paired_interval(d, n) for d in differences], b - a) < 0.97


def test_the_interval_of_one_sample_a_problem_is_bonett_and_prices() -> None:
    d = [1.0] * 12 + [-1.0] * 5 + [0.0] * 40
    p12, p21, n = 13 / 59, 6 / 59, 59
    half = stats.norm.ppf(0.975) * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    assert paired_interval(d) == pytest.approx((p12 - p21 - half, p12 - p21 + half))
    low, high = paired_interval([0.0] * 57)
    assert low == -high < 0


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (7, 2), (30, 30), (12, 31), (200, 150)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    differences = [1.0] * wins + [-1.0] * losses + [0.0] * 9
    assert mcnemar(differences) == pytest.approx(expected)
    assert mcnemar([-d for d in differences]) == mcnemar(differences)


def test_sign_flips_of_one_sample_a_problem_are_mcnemar() -> None:
    rows = [[1.0] * wins + [-1.0] * losses + [0.0] * (40 - wins - losses) for wins, losses in ((9, 2), (6, 6), (20, 5))]
    found = sign_flip(np.array(rows).T, seed=3)
    assert found == pytest.approx([mcnemar(row) for row in rows], abs=0.015)
    assert (sign_flip(np.array(rows).T, seed=3) == found).all()
    assert (sign_flip(np.array(rows).T, seed=4) != found).any()


def test_sign_flips_are_scipys_permutation_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, (12, 1))
    expected = stats.permutation_test((d[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(d)[0] == pytest.approx(expected, abs=0.02)
    missing = np.concatenate([d, np.full((3, 1), np.nan)])
    assert sign_flip(missing)[0] == pytest.approx(expected, abs=0.02)


def test_models_that_are_alike_look_different_one_time_in_20() -> None:
    rng = np.random.default_rng(0)
    found = sign_flip(rng.normal(size=(60, 2000)) * rng.exponential(size=(60, 1)), flips=2000)
    assert 0.03 < np.mean(found <= 0.05) < 0.07
