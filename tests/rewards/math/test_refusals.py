"""What the math verifier promises not to refuse, beside near misses that stay wrong: thousands in formulas, names
before equals signs, equal sets, approximations, notation. (Completion in a box, reference, whether it is right.)"""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify


def is_right(answer: str, reference: str) -> bool:
    return verify(rf"\boxed{{{answer}}}", reference).outcome is Outcome.CORRECT


def test_commas_of_thousands_in_formulas_are_no_separators() -> None:
    draw = random.Random(0)
    for _ in range(40):
        n = draw.randrange(1000, 999_999)
        for form in ("x = {}", "f(2) = {}", "V = {}\\pi", "{}x + 7", "{}(1.08)^t", r"\frac{{{}}}{{7}}", "5x - {}"):
            reference = form.format(n).rpartition("= ")[2]
            assert is_right(form.format(f"{n:,}"), reference), (form, n)
            assert not is_right(form.format(f"{n + 1:,}"), reference), (form, n)


NAMES = r"""
    \text{Area}|f_{\max}|V_1:V_2|\frac{PQ}{RS}|\bar{x}|\text{Total cost}|AB|\angle ABC|P(A \cap B)|f'(2)
    S_{\triangle ABC}
    E(X)|\overline{AB}|f(3)|\frac{V_1}{V_2}|\hat{p}|x_{\text{min}}|\sin A|\frac{dy}{dx}|[ABC]|m\angle A|Perimeter
""".replace("\n", "|")
NO_NAMES = [
    r"x^2",
    r"2x",
    r"x+y",
    r"\frac{y}{x}",
    r"xy",
    r"\sqrt{x}",
    r"3x-2",
    r"x^2+y^2",
    r"\log_2 x",
    r"\sin x + 1",
    r"-x",
]


def test_a_reference_may_name_the_quantity_before_an_equals_sign() -> None:
    draw = random.Random(1)
    for name in (part.strip() for part in NAMES.split("|")):
        n, m = draw.randrange(2, 99), draw.choice((101, 103, 107))
        if name:
            for value in (str(n), rf"\frac{{{n}}}{{{m}}}", rf"{n}\pi"):
                assert is_right(value, f"{name} = {value}"), name
                assert not is_right(f"{value}+1", f"{name} = {value}"), name


def test_the_right_side_of_an_equation_between_variables_is_not_the_equation() -> None:
    for left in NO_NAMES:
        assert not is_right("25", f"{left} = 25"), left


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"[0,4]\cup[4,9]", "[0,9]", True),
        (r"[0,4)\cup(4,9]", "[0,9]", False),
        (r"[0,4)\cup[4,9]", "[0,9]", True),
        (r"[0,5]\cup[4,9]", "[0,9)", False),
        (r"t \neq 3", r"(-\infty,3)\cup(3,\infty)", True),
        (r"t \neq 4", r"(-\infty,3)\cup(3,\infty)", False),
        (r"t \neq 3", r"(-\infty,3]\cup(3,\infty)", False),
        (r"\mathbb{R} \setminus \{3\}", r"t \ne 3", True),
        (r"t > -4 \text{ and } t < 1", "(-4,1)", True),
        (r"t > -4 \text{ or } t < 1", "(-4,1)", False),
        (r"t > -4 \text{ and } t \le 1", "(-4,1)", False),
        (r"(-5,2) \cap (0,9)", "(0,2)", True),
        (r"\{7,3,3\}", r"\{3,7\}", True),
        (r"\{7,3,4\}", r"\{3,7\}", False),
        ("7,3,3", r"3,7", False),
        (r"\text{all real numbers}", r"(-\infty,\infty)", True),
        ("all real numbers", r"(0,\infty)", False),
        (r"\sqrt{30} \approx 5.48", "5.48", True),
        (r"\sqrt{30} \approx 5.48", r"\sqrt{30}", True),
        (r"\sqrt{31} \approx 5.48", "5.48", False),
        (r"12\pi \approx 37.7", "37.7", True),
        (r"12\pi \approx 37.7", "12", False),
        ("5.48", r"\sqrt{30}", False),
        ("30‰", "0.03", True),
        ("30‰", "0.3", False),
        (r"0.\dot{6}", r"\frac{2}{3}", True),
        (r"0.1\dot{6}", r"\frac{1}{6}", True),
        (r"0.\dot{1}\dot{2}", r"\frac{12}{99}", True),
        (r"0.\dot{6}", "0.6", False),
        (r"10^{5} \cdot 2", "2e5", True),
        (r"10^{4} \cdot 2", "2e5", False),
        ("2 and 1/4", "2.25", True),
        ("2 and 1/4", "0.5", False),
        ("3*sin(theta)", r"3\sin\theta", True),
        ("alpha/2", r"\frac{\alpha}{2}", True),
        ("alpha/2", r"\frac{\beta}{2}", False),
        (r"\frac{(3m)!}{m!(2m)!}", r"\binom{3m}{m}", True),
        (r"\frac{(3m)!}{m!(2m)!}", r"\binom{3m}{2}", False),
        (r"\frac{(2k)!}{k!\,k!}", r"\binom{2k}{k}", True),
        (r"\binom{n+1}{k}", r"\binom{n}{k}+\binom{n}{k-1}", True),
        (r"\binom{n}{k}", r"\binom{n}{k+1}", False),
        (r"k\hbar", r"\hbar k", True),
        (r"k h", r"\hbar k", False),
        (r"\frac{p_{\text{max}}}{3}", r"p_{\text{max}}/3", True),
        (r"\frac{p_{\text{min}}}{3}", r"p_{\text{max}}/3", False),
        (r"\overline{5+2i}", "5-2i", True),
        (r"\overline{5+2i}", "5+2i", False),
        (r"\overline{z}", "z", False),
        ("C(6,2)", "15", True),
        ("C(6,3)", "15", False),
        (r"{}_6C_2", "15", True),
        (r"\frac{d}{dx}x^3", "3x^2", True),
        (r"\frac{d}{dx}x^3", "3x", False),
        (r"\frac{d}{dx}(\sin x)", r"\cos x", True),
        (r"\sfrac{2}{7}", r"\frac{2}{7}", True),
        (r"\nicefrac{2}{7}", r"\frac{7}{2}", False),
        (r"3\operatorname{cis}90^\circ", "3i", True),
        (r"3\operatorname{cis}90^\circ", "-3i", False),
        ("2^4 * 3^2 * 7", "2^4 3^2 7", True),
        ("2^5 3^3", "864", True),
        ("2^5 3^3", "865", False),
        ("5 3", "15", False),
        ("(2, 7, 4)", "(2;7;4)", True),
        ("(2, 4, 7)", "(2;7;4)", False),
        ("y=9, x=4", "(4,9)", True),
        ("y=4, x=9", "(4,9)", False),
        (r"G_n = \sum_{j=0}^{n-1} G_{n-1-j} G_j", r"G_n = \sum_{j=0}^{n-1} G_j G_{n-1-j}", True),
        (r"G_n = \sum_{j=1}^{n-1} G_{n-1-j} G_j", r"G_n = \sum_{j=0}^{n-1} G_j G_{n-1-j}", False),
        (r"\sum_{j=0}^{n} G_{j} H_j", r"\sum_{j=0}^{n} G_j G_j", False),
    ],
)
def test_one_value_in_two_notations(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) == right
