"""What the math verifier promises of looks: fonts, spaces, sizes, invisible characters, Unicode mathematics and
full-width punctuation change no value. Random numbers; the oracle is the number that was put in."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify

RIGHT, WRONG = Outcome.CORRECT, Outcome.WRONG
DRESSES = r"""
    \Large @|\hspace{2mm}@|\bf @|\texttt{@}|\textsf{@}|\rm @|{\bf @}|\mathbf{@}|\large{@}|\textbf{@}|\emph{@}|\,@\;
    \vspace{1ex} @|@\hspace*{1cm}|\phantom{0}@|@\label{eq}|\tag{1} @|\boldsymbol{@}|\mathrm{@}|\textnormal{@}|{\rm @}
    \color{blue}{@}|\textcolor{red}{@}|\ensuremath{@}|\kern 2pt @|\mathtt{@}|\textsc{@}|{@}|\small @ \normalsize|\it{@}
    \displaystyle @|\hskip 1em @|\underline{@}|\uline{@}|\mathstrut @|\left. @ \right.|\strut @|\! @|\quad @ \qquad
""".replace("\n", "|").split("|")
INVISIBLE = ["\ufeff", "\u2060", "\u200b", "\u200e", "\u200f", "\xad", "️", "\u2063", "\u061c"]
MARKS = ["✅", "✔", "☑", "🎉", "⭐", "👉", "💡", "😊"]
FORMULAS = (r"\frac{3}{7}", r"x^{2}+1", r"\sqrt{11}", r"-\frac{2}{5}", r"3\pi", r"(1,\frac{1}{2})")


def outcome(completion: str, reference: object) -> Outcome:
    return verify(completion, reference).outcome


def test_fonts_sizes_and_spaces_change_no_value() -> None:
    draw = random.Random(0)
    for dress in filter(None, map(str.strip, DRESSES)):
        for value in (str(draw.randrange(2, 999)), f"{draw.randrange(99)}.{draw.randrange(1, 99)}", *FORMULAS[:4]):
            completion = rf"\boxed{{{dress.replace('@', value)}}}"
            assert outcome(completion, value) is RIGHT, completion
            assert outcome(completion, "41/43") is WRONG, completion


def test_invisible_characters_and_marks_change_no_value() -> None:
    for i, hidden in enumerate(INVISIBLE):
        for text in (f"{hidden}3{i}", f"3{i}{hidden}", f"3{hidden}{i}"):
            assert outcome(rf"\boxed{{{text}}}", f"3{i}") is RIGHT, ascii(text)
    for mark in MARKS:
        for text in (
            f"{mark} Final Answer: 62 {mark}",
            f"The answer is 62 {mark}",
            rf"\boxed{{62}} {mark}",
            f"**62** {mark}",
        ):
            assert outcome(text, 62) is RIGHT, text
            assert outcome(text, 63) is WRONG, text
    assert outcome("The answer is 62 ❌", 62) is WRONG
    assert outcome("\N{RIGHT-TO-LEFT OVERRIDE}26", 62) is WRONG


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("⅝", r"\frac{5}{8}", True),
        ("⅝", r"\frac{3}{8}", False),
        ("3⅜", r"\frac{27}{8}", True),
        ("3⅜", r"\frac{9}{8}", False),
        ("t ⩽ 6", r"t \le 6", True),
        ("t ⩾ 6", r"t \le 6", False),
        ("⟨3, 8⟩", r"\langle 3,8\rangle", True),
        ("⟨8, 3⟩", r"\langle 3,8\rangle", False),
        ("⌊5.9⌋", "5", True),
        ("⌈5.2⌉", "6", True),
        ("⌈5.2⌉", "5", False),
        ("b₂ + 1", "b_2+1", True),
        ("b₁ + 1", "b_2+1", False),
        ("x₁₂", "x_{12}", True),
        ("4∶9", "4:9", True),
        ("xⁿ", "x^n", True),
        ("x⁻²", r"\frac{1}{x^2}", True),
        ("52₈", "52_8", True),
        ("52₈", "52", False),
        ("∛27", "3", True),
        ("∛27", "2.7", False),
        ("𝑥²+𝟏", "x^2+1", True),
        ("5′", "5'", True),
        ("x＝15", "x=15", True),
        ("x＝15", "x=16", False),
        ("（1，2）", "(1,2)", True),
        ("（2，1）", "(1,2)", False),
        ("50％", r"50\%", True),
        ("1，234", "1234", False),
        ("x ∉ [0,1]", r"x \in [0,1]", False),
        ("64个", "64", True),
        ("64个苹果", "64", True),
        ("64개", "64", True),
        ("92 рубля", "92", True),
        ("64万", "64", False),
        ("64个半", "64", False),
        ("64или65", "64", False),
        ("64 或 65", "64", False),
        ("64 тысячи", "64", False),
        ("３", "3", False),
        ("٣", "3", False),
    ],
)
def test_characters_beyond_ascii_mean_what_they_show(answer: str, reference: str, right: bool) -> None:
    assert (outcome(rf"\boxed{{{answer}}}", reference) is RIGHT) == right
