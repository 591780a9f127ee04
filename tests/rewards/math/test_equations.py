"""Equations are compared whole: both sides, every line, every condition."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify


def right(answer: str, reference: str) -> bool:
    return verify(rf"\boxed{{{answer}}}", reference).outcome is Outcome.CORRECT


def wrong(answer: str, reference: str) -> bool:
    return verify(rf"\boxed{{{answer}}}", reference).outcome is Outcome.WRONG


LEFT_SIDES = (
    r"\lim_{{x\to {a}}} f(x)",
    r"\lim_{{n\to\infty}} c_{{n+{a}}}",
    r"\int_0^{a} g(u)\,du",
    r"\iint_D {a}f\,dA",
    r"\sum_{{i=1}}^{{{a}}} b_i",
    r"\prod_{{i=1}}^{{{a}}} b_i",
    r"\sum_{{k=1}}^{{{a}}} k",
    r"\det({a}A)",
    r"\begin{{vmatrix}}p&{a}\\2&q\end{{vmatrix}}",
    r"f(x) = \int_0^x {a}g(t)\,dt",
)
RELATIONS = ("=", "=", "=", "<", r"\le", r"\ge", r"\ne", r"\approx")


@pytest.mark.parametrize("side", LEFT_SIDES)
def test_a_sum_a_limit_an_integral_or_a_determinant_equals_what_it_is_said_to(side: str) -> None:
    rng = random.Random(side)
    for _ in range(8):
        left = side.format(a=rng.randrange(2, 6))
        value, other = rng.sample(range(-20, 20), 2)
        relation = rng.choice(RELATIONS)
        assert right(f"{left} {relation} {value}", f"{left}{relation} {value}"), (left, relation)
        assert not right(f"{left} {relation} {other}", f"{left} {relation} {value}"), (left, relation)
        others = rng.choice(LEFT_SIDES).format(a=7)
        assert not right(f"{others} {relation} {value}", f"{left} {relation} {value}"), (left, others, relation)
    assert wrong(f"{left} = 1", f"{left} = 2")
    assert right(f"{left} = 3", "3")


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        (r"3 = \lim_{x\to 0} f(x)", r"\lim_{x\to 0} f(x) = 3", True),
        (r"\sum_{i=1}^n a_i > 3", r"3 < \sum_{i=1}^n a_i", True),
        (r"\lim_{n\to\infty} a_n \le 3", r"\lim_{n\to\infty} a_n \ge 3", False),
        (r"\int x^2 dx = x^3/3 + C", r"\int x^2\,dx = \frac{x^3}{3} + C", True),
        (r"\int x^2 dx = x^3/4 + C", r"\int x^2\,dx = \frac{x^3}{3} + C", False),
        (r"\int_0^1 f = 3 = k", r"\int_0^1 f = 4 = k", False),
        (r"x + y = 3 + 4 = 7", "x + y = 7", True),
    ],
)
def test_sides_may_be_swapped_and_steps_between_left_out(answer: str, reference: str, equal: bool) -> None:
    assert right(answer, reference) == equal


SEPARATORS = (r" \quad ", r"\qquad ", "\n", r" \\ ", "\n\n", r",\quad ", " ")


def system(names: list[str], values: list[int], separator: str) -> str:
    return separator.join(f"{name} = {value}" for name, value in zip(names, values, strict=True))


def test_several_equations_are_a_list_whatever_stands_between_them() -> None:
    rng = random.Random(0)
    for _ in range(60):
        names = rng.sample(["a", "b", "x", "y", "k", "x_1", "x_2", r"\alpha", "u'", "a_{12}"], rng.randrange(2, 4))
        values = [rng.randrange(-9, 10) for _ in names]
        others = [*values]
        others[rng.randrange(len(values) - 1)] += 1
        answer, reference = (system(names, values, rng.choice(SEPARATORS)) for _ in range(2))
        with_commas = system(names, values, ", ")
        assert right(answer, with_commas), (answer, with_commas)
        if " " not in answer.replace(" = ", ""):
            assert right(answer, reference), (answer, reference)
        assert not right(system(names, others, rng.choice(SEPARATORS)), with_commas), (others, with_commas)
        assert not right(system(names, others, rng.choice(SEPARATORS[:-1])), reference), (others, reference)


def test_only_the_last_of_several_equations_is_no_answer_to_all() -> None:
    assert wrong(r"a = 8 \quad b = 3", "3")
    assert wrong("3", r"a = 8 \quad b = 3")
    assert right("b = 3\na = 8", r"a = 8 \quad b = 3")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("x = 12 + 6\n= 18", "18"), ("3 + 4 = 7\n7 * 2 = 14", "14"), ("A = bh\nA = 6", "6"), ("C = 2 r = 10", "10")],
)
def test_lines_of_one_calculation_are_no_list(answer: str, reference: str) -> None:
    assert verify(f"<answer>\n{answer}\n</answer>", reference).outcome is Outcome.CORRECT


MATRIX = r"\begin{{{kind}}}{end}{0}&{1}\\{end}{2}&{3}{end}\end{{{kind}}}"


def test_a_line_break_in_a_formula_hides_nothing_behind_it() -> None:
    rng = random.Random(1)
    for _ in range(40):
        entries = [rng.randrange(1, 9) for _ in range(4)]
        factor, kind, end = rng.randrange(2, 9), rng.choice(("pmatrix", "bmatrix")), rng.choice(("\n", "", " \n"))
        inverse = rf"\frac{{1}}{{{factor}}}{end}{MATRIX.format(*entries, kind=kind, end=end)}"
        by_entry = MATRIX.format(*(rf"\frac{{{entry}}}{{{factor}}}" for entry in entries), kind=kind, end="")
        other = MATRIX.format(*(rf"\frac{{{entry + 1}}}{{{factor}}}" for entry in entries), kind=kind, end="")
        assert right(by_entry, inverse), (by_entry, inverse)
        assert right(inverse, by_entry), (by_entry, inverse)
        assert not right(other, inverse), (other, inverse)
        assert not right(rf"\frac{{1}}{{{factor}}}", inverse)
        assert verify(f"The answer is ${inverse}$.", rf"\frac{{1}}{{{factor}}}").outcome is Outcome.WRONG


def test_a_sum_behind_a_line_break_counts() -> None:
    assert not right("\\frac{2}{7}\n\\sum_{i=1}^{p} d_i", "\\frac{2}{7}\n\\sum_{i=1}^{p} c_i")
    assert not right("\\frac{2}{7}", "\\frac{2}{7}\n\\sum_{i=1}^{p} c_i")
    assert right("x^2 +\n3", "x^2+3")


KINDS = ("odd", "even", "prime", "composite", "rational", "irrational", "positive", "negative", "an integer", "real")


def test_words_behind_a_variable_are_part_of_the_answer() -> None:
    rng = random.Random(2)
    for _ in range(60):
        subject = rng.choice(("k", "t", "4m", "n+1", "x^2", r"\frac{p}{q}"))
        kind, other = rng.sample(KINDS, 2)
        dress = rng.choice((r"{0} \text{{ {1}}}", r"{0} \text{{ is {1}}}", r"{0}\text{{ is {1}}}", "{0} is {1}"))
        reference = dress.format(subject, kind)
        assert right(dress.format(subject, kind), reference), reference
        assert wrong(dress.format(subject, other), reference), (other, reference)
        assert wrong(subject, reference), reference


@pytest.mark.parametrize("answer", [r"n \text{ is divisible by 3}", r"f \text{ is increasing}", r"x \text{ apples}"])
def test_other_words_behind_a_variable_count_too(answer: str) -> None:
    other = answer.replace("3", "5").replace("increasing", "decreasing").replace("apples", "eggs")
    assert right(answer, answer)
    assert wrong(other, answer)


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        (r"p \text{ divides } q", r"p \text{ does not divide } q"),
        (r"3n \text{ is divisible by } 6", r"3n \text{ is divisible by } 9"),
        (r"2k+1 \text{ (odd)}", r"2k+1 \text{ (even)}"),
        (r"p \text{ true}, q \text{ false}", r"p \text{ false}, q \text{ true}"),
        (r"5 \text{ is odd}", r"5 \text{ is even}"),
    ],
)
def test_words_between_and_around_values_count(answer: str, other: str) -> None:
    assert right(answer, answer)
    assert wrong(answer, other)


def test_units_behind_a_formula_may_be_left_out() -> None:
    assert right(r"2x \text{ dollars}", "2x")
    assert right(r"x \text{ eggs}", "x")


def test_a_condition_is_compared_with_the_value_under_it() -> None:
    rng = random.Random(3)
    for _ in range(40):
        a, b, low = rng.randrange(2, 9), rng.randrange(2, 9), rng.randrange(5)
        word, other = rng.choice(("for", "if", "when", r"\text{ for }", r"\text{ if }")), rng.choice(("for", "if"))
        answer, reference = f"f(t)={a}t {word} {low}<t<9", f"f(t)={b}t {other} {low}<t<9"
        assert (right if a == b else wrong)(answer, reference), (answer, reference)
        assert wrong(f"{b}t {word} {low + 1}<t<9", reference)
        assert wrong(f"{a}t when t = 4", f"{a + 1}t when t = 4")


@pytest.mark.parametrize("word", ["for", "on", "of", "by", "at", "not", "in", "the", "up to"])
def test_a_short_word_is_no_product_of_its_letters(word: str) -> None:
    assert wrong(f"6 {word} 0", "0")
    assert not right(f"3 {word} 4", f"4 {word} 3")
