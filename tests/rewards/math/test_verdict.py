"""What the math verifier promises: labelled verdicts, exact comparison, bounded work, workers that are replaced.

The oracles are labels written by hand (verdicts.txt), exact fractions, and the data sets' own answers.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lora.rewards import Outcome, RewardError, Score, Unscorable, math_match, resolve, score, verify
from rl_lora.rewards.math import workers
from rl_lora.rewards.math.cleaning import clean
from rl_lora.rewards.math.extraction import FLEXIBLE, METHODS, STRICT, extract
from rl_lora.rewards.math.numbers import quantity
from tests import ROOT

MARKS = {"=": Outcome.CORRECT, "!": Outcome.WRONG, "0": Outcome.NO_ANSWER}


def table() -> list[tuple[str, str, Outcome, str]]:
    """(completion, reference, label, where it stands)."""
    rows, reference = [], ""
    lines = (ROOT / "tests" / "rewards" / "math" / "verdicts.txt").read_text(encoding="utf-8").split("\n")
    for number, raw in enumerate(lines, 1):
        line = raw.replace("⏎", "\n")
        if line.startswith("ref "):
            reference = line[4:]
        elif line[:2] in ("= ", "! ", "0 "):
            rows.append((line[2:], reference, MARKS[line[0]], f"line {number}: {line!r} for {reference!r}"))
    return rows


def outcome(completion: str, reference: Any, **options: Any) -> Outcome:
    return verify(completion, reference, **options).outcome


def boxed(text: object) -> str:
    return rf"So the answer is $\boxed{{{text}}}$."


# ---- verdicts ---------------------------------------------------------------------------------------------------


def test_every_labelled_verdict_is_met() -> None:
    rows = table()
    wrong = [
        f"{where} -> {got.value}"
        for completion, reference, label, where in rows
        if (got := outcome(completion, reference)) is not label
    ]
    assert not wrong, "\n".join(wrong)
    assert len(rows) >= 300
    assert sum(label is not Outcome.CORRECT for _, _, label, _ in rows) >= 0.48 * len(rows)


def test_equality_is_symmetric_on_the_table() -> None:
    """A right answer as the reference makes the reference a right answer (where neither is prose)."""
    rows = [row for row in table() if row[0].startswith(r"\boxed{") and "####" not in row[1] and row[2] is MARKS["="]]
    held = [(extract(completion, STRICT), reference) for completion, reference, _, _ in rows]
    wrong = [(found, reference) for found, reference in held if found and not symmetric(found.text, reference)]
    assert not wrong


def symmetric(answer: str, reference: str) -> bool:
    lopsided = ("=", r"\in", "(C)", "B", "_", " 12")  # what may be left out on one side only
    return any(mark in answer + reference for mark in lopsided) or outcome(boxed(reference), answer) is Outcome.CORRECT


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_compare_as_fractions_do(a: Fraction, b: Fraction) -> None:
    written = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    assert outcome(boxed(written), a) is Outcome.CORRECT
    assert outcome(boxed(f"{a.numerator}/{a.denominator}"), written) is Outcome.CORRECT
    assert (outcome(boxed(written), b) is Outcome.CORRECT) == (a == b)


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40), st.sampled_from(["", ",", "{,}", r"\,"]))
def test_integers_are_read_exactly_with_and_without_separators(a: int, b: int, separator: str) -> None:
    written = f"{a:,}".replace(",", separator)
    assert outcome(f"It is ${written}$", a) is Outcome.CORRECT
    assert (outcome(f"It is ${written}$", b) is Outcome.CORRECT) == (a == b)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reference_is_the_number_that_was_written(x: float) -> None:
    assert outcome(boxed(repr(x)), x) is Outcome.CORRECT


@pytest.mark.parametrize("reference", [18, 18.0, Decimal("18"), Fraction(18), "18", "... #### 18", r"so \boxed{18}"])
def test_references_may_be_numbers_or_texts_of_data_sets(reference: Any) -> None:
    assert outcome(boxed(18), reference) is Outcome.CORRECT
    assert outcome(boxed(19), reference) is Outcome.WRONG


@pytest.mark.parametrize("reference", [None, True, "", "  ", "####", float("nan"), float("inf"), Decimal("nan"), [5]])
def test_what_cannot_be_a_reference_is_an_error_not_a_zero(reference: Any) -> None:
    with pytest.raises(ValueError, match="math reward needs"):
        verify(boxed(5), reference)


@pytest.mark.parametrize(
    "reference", [r"\frac{1}{", r"\sqrt{", "3 +", "x" * 2000, "(" * 60 + "1" + ")" * 60, "9" * 1500]
)
def test_a_reference_that_cannot_be_read_is_unscorable(reference: str) -> None:
    verdict = verify(boxed(5), reference)
    assert verdict.outcome is Outcome.UNSCORABLE
    assert "reference" in verdict.reason
    with pytest.raises(Unscorable, match="reference"):
        math_match(boxed(5), reference)


@pytest.mark.parametrize(
    ("percent", "reference", "right"),
    [
        ("50%", 50, True),
        ("50%", 0.5, True),
        ("50%", "50%", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("0.5%", "50%", False),
        ("5%", 50, False),
        ("50%", 5, False),
        ("50%", "50 cm", False),
    ],
)
def test_a_percent_sign_on_one_side_may_be_read_both_ways(percent: str, reference: Any, right: bool) -> None:
    assert (outcome(percent, reference) is Outcome.CORRECT) == right


# ---- extraction -------------------------------------------------------------------------------------------------

ANSWERS = {
    "boxed": (r"\boxed{1} then \fbox{\frac{2}{3}} and 4", r"\frac{2}{3}"),
    "hash": ("#### 3\n#### Step 2\n#### 5 apples\n7", "5 apples"),
    "tag": ("<answer>1</answer> <Answer> 2 </ANSWER> 3", "2"),
    "phrase": ("The answer is 4. No: the final answer is **5** of 6.", "5"),
    "last_number": ("$x = 4$, or -7.5% of 3/4", "3/4"),
    "last_expression": (r"7 of them, so $x^2 + 1$.", "x^2 + 1"),
    "whole": ("x^2 + 1", "x^2 + 1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_its_place_and_nothing_elsewhere(method: str) -> None:
    text, answer = ANSWERS[method]
    found = extract(text, [method])
    assert found is not None
    assert (clean(found.text), found.method) == (answer, method)
    assert extract("nothing to be seen here at all", [method]) is None


def test_strict_takes_marked_answers_only() -> None:
    for text in (boxed(5), "#### 5", "<answer>5</answer>"):
        assert outcome(text, 5, extract="strict") is Outcome.CORRECT
    for text in ("The answer is 5.", "5", "$5$", "**5**", "#### 1. Add 5"):
        assert outcome(text, 5, extract="strict") is Outcome.NO_ANSWER
    assert outcome("The answer is 5, not 6", 5, extract=("last_number",)) is Outcome.WRONG
    assert outcome("The answer is 5, not 6", 5, extract=("phrase", "last_number")) is Outcome.CORRECT


def test_an_empty_place_for_the_answer_is_no_answer_even_if_numbers_stand_elsewhere() -> None:
    for text in (r"\boxed{5} no, \boxed{}", r"5 \boxed{ }", "5 <answer></answer>", "5\n####", r"5 = \boxed{5"):
        verdict = verify(text, 5)
        assert (verdict.outcome, verdict.answer) == (Outcome.NO_ANSWER, None), text
    assert math_match(r"\boxed{}", 5) == Score(0.0, {"answered": 0.0}, success=False)


@pytest.mark.parametrize("extraction", ["lenient", (), ("boxed", "last"), ""])
def test_an_unknown_way_to_extract_is_refused_saying_what_there_is(extraction: Any) -> None:
    with pytest.raises(ValueError, match="'strict', 'flexible' or names out of boxed"):
        verify("5", 5, extract=extraction)


def test_thoughts_and_special_tokens_are_no_answer() -> None:
    assert outcome(r"<think>\boxed{6}</think> The answer is 5.<|im_end|>", 5, extract="flexible") is Outcome.CORRECT
    assert outcome(r"<think>\boxed{5}</think>", 5) is Outcome.NO_ANSWER
    assert outcome("5</s>", 5) is Outcome.CORRECT


def test_the_verdict_tells_what_was_judged() -> None:
    verdict = verify(r"It is \boxed{\frac{1}{2}}", "0.5")
    assert (verdict.outcome, verdict.answer, verdict.method) == (Outcome.CORRECT, r"\frac{1}{2}", "boxed")
    assert set(STRICT) < set(FLEXIBLE) <= set(METHODS)


# ---- as a reward ------------------------------------------------------------------------------------------------


def test_math_is_a_built_in_reward_with_options() -> None:
    assert score(resolve("math"), boxed(5), 5) == Score(1.0, {"answered": 1.0}, True, "5")
    assert score(resolve("math"), boxed(6), 5) == Score(0.0, {"answered": 1.0}, False, "6")
    strict = resolve({"math": {"extract": "strict"}, "length": 0.0})
    result = score(strict, "5", 5)
    assert (result.value, result.parts["math/answered"], result.success) == (0.0, 0.0, False)
    assert score(resolve({"math": {"extract": ["phrase"]}}), "The answer is 5", 5).success


@pytest.mark.parametrize(
    "options", [{"extract": "lenient"}, {"timeout": 0}, {"timeout": float("nan")}, {"strict": True}]
)
def test_options_that_cannot_be_are_refused_before_a_run(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="math"):
        resolve({"math": options})


def test_importing_rewards_imports_no_computer_algebra() -> None:
    code = "import sys, rewards; print({'sympy', 'mpmath', 'math_verify', 'torch', 'numpy'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=True, **options
    )


def test_a_thousand_plain_verdicts_take_less_than_a_second_and_no_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "ask", lambda *_: pytest.fail("a plain number reached a worker"))
    rng = random.Random(0)
    forms = (
        "The sum is **{}**.",
        r"So \boxed{{{}}}",
        "He has ${} left.\n#### {}",
        "47 + 38 = {}",
        r"\boxed{{\frac{{{}}}{{7}}}}",
    )
    prose = "First we add the eggs, 16 - 3 = 13, and then sell them for $2 each. " * 10
    items = [(prose + rng.choice(forms).format(*[rng.randrange(99)] * 2), str(rng.randrange(99))) for _ in range(2000)]
    start = time.process_time()
    for completion, reference in items:
        verify(completion, reference)
    rate = len(items) / (time.process_time() - start)
    with capsys.disabled():
        print(f" [{rate:,.0f} plain verdicts per second]", end="")
    assert rate > 1000


# ---- data sets --------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("RL_LORA_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.parametrize("name", ["gsm8k_test", "math500", "svamp_test", "mawps_test", "aime24"])
def test_every_answer_of_a_data_set_equals_itself_and_not_its_neighbour(name: str) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent; RL_LORA_DATA names the folder")
    references = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [str(reference).rpartition("####")[2].strip() for reference in references]
    unequal = {("5", "x=5")}  # neighbours that are equal after all
    for i, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        assert outcome(boxed(answer), reference) is Outcome.CORRECT, reference
        other = references[(i + 1) % len(references)]
        if other != reference and answers[(i + 1) % len(answers)] != answer:
            expected = Outcome.CORRECT if (answer, other) in unequal else Outcome.WRONG
            assert outcome(boxed(answer), other) is expected, (answer, other)


# ---- attacks ----------------------------------------------------------------------------------------------------

SECONDS = 1.0
SLACK = 5.0  # for killing a worker and starting the next, on a busy machine
ATTACKS = {
    "tower": "9^{9^{9^{9^{9}}}}",
    "plain tower": "9**9**9**9**9",
    "long tower": "2^" * 300 + "2",
    "giant power": "10^{10^{10}}",
    "giant base": "9" * 900 + "^{" + "9" * 90 + "}",
    "giant decimal exponent": "1e999999999",
    "giant negative exponent": "1e-999999999",
    "factorial": "99999999999!",
    "factorials": "9!!!!!!!!!",
    "factorial tower": "((((9!)!)!)!)!",
    "binomial": r"\binom{10^{9}}{5\cdot 10^{8}}",
    "binomial for Math-Verify": r"\sum_{k=0}^{1} \binom{1000000000}{500000000}",
    "factorial for Math-Verify": r"\int_0^1 (99999999!)! dx",
    "sum": r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}",
    "product": r"\prod_{k=1}^{10^{9}} k",
    "integral": r"\int_0^{\infty} \frac{\sin(x^{x^{x}})}{\log(x)^{x}} dx",
    "limit": r"\lim_{x \to 0} \frac{\sin(x^{100})^{x}}{x^{x^{x}}}",
    "expansion": r"\int (a+b+c+d+f+g)^{200} da",
    "identity matrix": r"\operatorname{eye}(100000)",
    "zeros": r"\operatorname{zeros}(100000,100000)",
    "big matrix": r"\begin{pmatrix}" + r"1 & 2 \\" * 90 + r"\end{pmatrix}",
    "deep brackets": "(" * 490 + "1" + ")" * 490,
    "deep braces": "{" * 40 + "1" + "}" * 40,
    "megabyte of brackets": "(" * 2**20,
    "megabyte of digits": "9" * 2**20,
    "megabyte of boxes": r"\boxed{" * 2**17,
    "megabyte of closed boxes": r"\boxed{1}" * 2**17,
    "megabyte of dollars": "$" * 2**20,
    "megabyte of display math": r"\[" * 2**19,
    "megabyte of inline math": r"\(" * 2**19,
    "megabyte of dollar pairs": "$1$ " * 2**18,
    "megabyte of answers": "the answer is " * 2**16,
    "megabyte of tags": "<answer>" * 2**17,
    "megabyte of hashes": "#" * 2**20,
    "megabyte of spaces": "the answer is" + " " * 2**20 + "x",
    "megabyte of commas": "1,111" * 2**17,
    "megabyte of stars": "**" * 2**19,
    "megabyte of signs": "-" * 2**20 + "1",
    "backslashes": "\\" * 900,
    "nested roots": r"\sqrt{" * 49 + "2" + "}" * 49,
    "nested fractions": r"\frac{1}{" * 49 + "2" + "}" * 49,
    "many signs": "-" * 999,
    "wide spaces": r"\quad " * 150,
    "lines": "a = 1\n" * 150,
    "conditions": "odd for " * 120,
    "alternatives": "the answer is either " + "1 or " * 30 + "x",
    "many factors": "x" * 3 + " x" * 300,
    "many terms": "+".join(f"x_{i}" for i in range(150)),
    "many list items": "{" + ",".join(["x"] * 400) + "}",
    "arabic digits": "\N{ARABIC-INDIC DIGIT EIGHT}\N{ARABIC-INDIC DIGIT FIVE}",
    "fullwidth digits": "\N{FULLWIDTH DIGIT EIGHT}\N{FULLWIDTH DIGIT FIVE}",
    "superscript": "8\N{SUPERSCRIPT FIVE}",
    "mathematical bold digits": "\N{MATHEMATICAL BOLD DIGIT EIGHT}\N{MATHEMATICAL BOLD DIGIT FIVE}",
    "circled": "\N{CIRCLED DIGIT ONE}",
    "zero bytes": "\0" * 900,
    "surrogates": "\ud800" * 900,
    "right-to-left": "\N{RIGHT-TO-LEFT OVERRIDE}58",
    "unbalanced": r"\frac{1}{2",
    "unbalanced left": r"\left( \frac{1}{2}",
    "unclosed matrix": r"\begin{pmatrix} 1 & 2 \\",
    "wrong end": r"\begin{pmatrix} 1 \end{bmatrix}",
    "bare commands": r"\frac \sqrt \sum \int",
    "nan": "nan",
    "infinity": "-oo",
    "json": '"}\n{"outcome": "equal"}',
    "newlines": "\n".join(["85"] * 300) + "\n8\n5\n",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_text_hangs_crashes_or_is_right(name: str) -> None:
    for completion, reference in ((ATTACKS[name], 86), (boxed(ATTACKS[name]), r"\sqrt{86}")):
        start = time.monotonic()
        verdict = verify(completion, reference, timeout=SECONDS)
        assert time.monotonic() - start < SECONDS + SLACK
        assert verdict.outcome is not Outcome.CORRECT


READABLE = (r"\sqrt{5}", "x^2+1", "y=2x+3", "[2,5)", r"\{1,\sqrt{2}\}", r"(1,\pi)", "x>2", r"2\cos 7^\circ", "|x|")
UNREADABLE = (
    "x<y",
    r"\le",
    "x=",
    r"\frac{1}{",
    r"\begin{pmatrix}",
    r"\{x | x",
    "a=b=c",
    r"7\pm",
    r"\cup",
    r"\sum",
    "3 +",
)


@pytest.mark.parametrize("answer", UNREADABLE)
def test_no_answer_makes_a_good_reference_unreadable(answer: str) -> None:
    for reference in READABLE:
        assert outcome(f"<answer>{answer}</answer>", reference) is Outcome.WRONG, reference


def test_what_is_refused_beforehand_is_wrong_and_not_left_out() -> None:
    for name in ("tower", "plain tower", "giant power", "factorial", "factorial tower", "binomial", "deep brackets"):
        assert outcome(boxed(ATTACKS[name]), r"\sqrt{85}", timeout=SECONDS) is Outcome.WRONG, name
    assert outcome(boxed("x" * 2000), r"\sqrt{85}") is Outcome.WRONG


PAYLOADS = [
    "__import__('os').system('touch {}')",
    "exec(\"open('{}','w')\")",
    "().__class__.__base__.__subclasses__()",
    "open('{}','w')",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "lambda: open('{}','w')",
    r"\text{{__import__('os').system('touch {}')}}",
    r"\operatorname{{open('{}','w')}}(1)",
    r"f(__import__('os').system('touch {}'))",
    r"\int_0^1 __import__('os').system('touch {}') dx",
    r"x_{{__import__('os').system('touch {}')}}",
    r"\sum_{{k=open('{}','w')}}^3 k",
    r"\overline{{__import__('os')}}",
    "1+1; import os; os.system('touch {}')",
    "$(touch {})",
    "`touch {}`",
]


@pytest.fixture
def spied_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Workers in which sympy's `eval` of a text leaves a file behind."""
    spy = tmp_path / "evaluated"
    code = (
        "import sympy.parsing.sympy_parser as p, sys\n"
        f"def spy(code, *rest): open({str(spy)!r}, 'a').write(str(code)); raise ValueError\n"
        "p.eval_expr = spy\n"
    )
    start = workers._START.replace("; from rl_lora", f"; exec({code!r}); from rl_lora", 1)
    assert start != workers._START
    monkeypatch.setattr(workers, "_START", start)
    workers.close()
    yield spy
    workers.close()


def test_nothing_that_a_model_wrote_is_evaluated(spied_workers: Path, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for payload in PAYLOADS:
        text = payload.format(target)
        for completion, reference in ((text, r"\sqrt{5}"), (boxed(text), r"\sqrt{5}"), (boxed(r"\int_0^1 x dx"), text)):
            assert outcome(completion, reference, timeout=SECONDS) is not Outcome.CORRECT
    for answer in (r"\int_0^1 x dx", r"\sum_{k=1}^{10} k", r"\gcd(4,6)", r"\lim_{x \to 0} \frac{\sin x}{x}", "x<y+1"):
        verify(boxed(answer), r"\sqrt{5}")
        verify(boxed(answer), "x+y>3")
    assert not target.exists()
    assert not spied_workers.exists(), spied_workers.read_text()


FRAGMENT_NAMES = r"""
    \frac \frac{1}{2} \sqrt \boxed{ \boxed{5} \left( \right) \begin{pmatrix} \end{pmatrix} \\ \text{ \cup \infty \pm \le
    \sum_{k=1}^{n} \int_0^1 dx \lim_{x\to0} \sin \log_ \binom \pi ^{ #### <answer> </answer> ** \( \) \[ \] 10^ \circ
    \in \operatorname{ \overline{ \det \gcd( − ٣ ½ ² √ ≤ \mathbb{R} \cap \ge 99999 1,234 __import__
"""
FRAGMENTS = [*"0123456789xyabein+-*/^_=<>(){}[]|!,.;:%$#&'\" \n\\~`\0", "the answer is ", *FRAGMENT_NAMES.split()]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)


@settings(max_examples=250, deadline=None)
@given(TEXTS, st.sampled_from([5, r"\sqrt{5}", "x^2+1", "(1,2)", r"\text{Evelyn}", "x=5", r"[2,5)", "A"]))
def test_any_text_gets_a_verdict_in_time(text: str, reference: Any) -> None:
    for completion in (text, boxed(text)):
        start = time.monotonic()
        verify(completion, reference, timeout=SECONDS)
        assert time.monotonic() - start < SECONDS + SLACK


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text_may_stand_in_a_reference(text: str) -> None:
    try:
        start = time.monotonic()
        verify(boxed(r"\sqrt{5}"), text, timeout=SECONDS)
        assert time.monotonic() - start < SECONDS + SLACK
    except ValueError as error:
        assert "math reward needs" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_ten_thousand_attacks(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    pieces = [*FRAGMENTS, *(a for a in ATTACKS.values() if len(a) < 200)]
    references = [5, r"\sqrt{5}", "x^2+1", "(1,2)", r"\text{Evelyn}", "x=5"]
    counts = dict.fromkeys(Outcome, 0)
    start, slowest = time.monotonic(), 0.0
    for _ in range(10_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
        before = time.monotonic()
        verdict = verify(rng.choice((text, boxed(text))), rng.choice(references), timeout=SECONDS)
        slowest = max(slowest, time.monotonic() - before)
        counts[verdict.outcome] += 1
    seconds = time.monotonic() - start
    with capsys.disabled():
        named = ", ".join(f"{count} {kind.value}" for kind, count in counts.items())
        print(f"\n10,000 attacks: {10_000 / seconds:,.0f} per second, slowest {slowest:.1f} s; {named}")
    assert slowest < SECONDS + SLACK
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert memory < workers.MEMORY_MB


# ---- workers ----------------------------------------------------------------------------------------------------

FORMULA = (r"\boxed{\frac{2}{\sqrt{2}}}", r"\sqrt{2}")
BAD_FORMULA = (r"\boxed{\frac{3}{\sqrt{2}}}", r"\sqrt{2}")


def formulas_are_judged() -> bool:
    return outcome(*FORMULA) is Outcome.CORRECT and outcome(*BAD_FORMULA) is Outcome.WRONG


@pytest.fixture
def misbehaving_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers that do as an answer tells them."""
    code = (
        "import os, signal, time, rl_lora.rewards.math.compare as c\n"
        "honest = c.compare\n"
        "def compare(answer, reference):\n"
        "    if 'h_1' in answer: time.sleep(60)\n"
        "    if 'h_2' in answer: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    if 'd_1' in answer: os._exit(3)\n"
        "    if 'd_2' in answer: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if 'm_1' in answer: return str(len([bytes(10**8) for _ in range(100)]))\n"
        "    if 'm_2' in answer: return str(len(bytes(10**11)))\n"
        "    if 'r_1' in answer: raise KeyError('a bug')\n"
        "    if 'p_1' in answer: print('equal', flush=True)\n"
        "    return honest(answer, reference)\n"
        "c.compare = compare\n"
    )
    start = workers._START.replace("; from rl_lora", f"; exec({code!r}); from rl_lora", 1)
    monkeypatch.setattr(workers, "_START", start)
    workers.close()
    yield
    workers.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("h_1", "no verdict within 0.5 s"),
        ("h_2", "no verdict within 0.5 s"),
        ("d_1", "died"),
        ("d_2", "died"),
        ("m_1", "memory"),
        ("m_2", "memory"),
        ("r_1", "KeyError: 'a bug'"),
    ],
)
def test_a_worker_that_hangs_dies_or_eats_memory_is_replaced(
    misbehaving_workers: None, answer: str, reason: str
) -> None:
    verify(*FORMULA)
    verdict = verify(boxed(answer), r"\sqrt{2}", timeout=0.5 if answer[0] == "h" else 5.0)
    assert verdict.outcome is Outcome.UNSCORABLE
    assert reason in verdict.reason
    assert formulas_are_judged()
    with pytest.raises(Unscorable):
        math_match(boxed(answer), r"\sqrt{2}", timeout=0.5 if answer[0] == "h" else 5.0)


def test_what_a_library_prints_is_no_verdict(misbehaving_workers: None) -> None:
    assert outcome(boxed("p_1"), r"\sqrt{2}") is Outcome.WRONG


def test_a_worker_killed_between_items_is_replaced() -> None:
    assert formulas_are_judged()
    for worker in workers._pool.all:
        worker.process.kill()
    time.sleep(0.1)
    assert formulas_are_judged()


def test_a_worker_that_cannot_start_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['math_verify'] = None"
    start = workers._START.replace("; from rl_lora", f"; exec({code!r}); from rl_lora", 1)
    monkeypatch.setattr(workers, "_START", start)
    workers.close()
    with pytest.raises(RewardError, match="math_verify"):
        verify(*FORMULA)


def test_threads_share_the_workers() -> None:
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(formulas_are_judged())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 8
    assert len(workers._pool.all) <= workers.MAX_WORKERS


def test_it_works_inside_a_running_event_loop_and_in_its_threads() -> None:
    async def judge() -> list[bool]:
        return [
            formulas_are_judged(),
            *await asyncio.gather(*(asyncio.to_thread(formulas_are_judged) for _ in range(4))),
        ]

    assert asyncio.run(judge()) == [True] * 5


def judge_in_process(queue: Any) -> None:
    queue.put((formulas_are_judged(), [worker.process.pid for worker in workers._pool.all]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_it_works_in_processes_of_any_kind_each_with_its_own_workers(method: str, daemon: bool) -> None:
    assert formulas_are_judged()
    own = {worker.process.pid for worker in workers._pool.all}
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=judge_in_process, args=(queue,), daemon=daemon)  # type: ignore[attr-defined]
    process.start()
    judged, pids = queue.get(timeout=60)
    process.join(30)
    assert judged
    assert process.exitcode == 0
    assert not own & set(pids)
    assert formulas_are_judged()  # the parent's workers are as they were
    assert {worker.process.pid for worker in workers._pool.all} == own
    assert gone(pids)


def test_a_fork_while_another_thread_holds_the_pool_does_not_hang() -> None:
    assert formulas_are_judged()
    with workers._pool.lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if formulas_are_judged() else 1)
    deadline = time.monotonic() + 30
    while (waited := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(waited[1]) == 0


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


SCRIPT = """
from rl_lora.rewards import verify
from rl_lora.rewards.math import workers
import os, signal, sys
verify(r'\\boxed{\\frac{2}{\\sqrt{2}}}', r'\\sqrt{2}')
print(*(worker.process.pid for worker in workers._pool.all), flush=True)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)", "1/0", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_the_program_however_it_ends(end: str) -> None:
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT + end], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    pids = [int(pid) for pid in run.stdout.split()]
    assert pids
    assert gone(pids)
    assert time.monotonic() - start < 30


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('started')\n" + SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "train.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert run.stdout.count("started") == 1


def test_quantities_are_read_with_their_units() -> None:
    for text, unit in [
        ("5 cm", "cm"),
        (r"5\text{ cm}^2", "cm^2"),
        ("5 eggs", "?egg"),
        ("$5", "$"),
        ("5%", "%"),
        ("5", None),
    ]:
        read = quantity(clean(text))
        assert read is not None
        assert (read.value, read.unit) == (5, unit)


@pytest.mark.parametrize(
    "same",
    [
        ("The answer is 18", "#### 18", r"\boxed{18.0}", "$18", r"\boxed{18 \text{ dollars}}", "it makes 18."),
        (r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{1/2}"),
        (r"\boxed{(B)}", r"\boxed{B}", r"\boxed{\text{(B)}}"),
        (r"\boxed{Tuesday}", r"\boxed{\text{tuesday}}"),
        (r"\boxed{x^{2}+1}", r"\boxed{x^2 + 1}", r"$x^2+1$"),
        (r"\boxed{50\%}", r"\boxed{50 \%}"),
    ],
)
def test_answers_that_are_the_same_at_sight_are_votes_for_one(same: tuple[str, ...]) -> None:
    answers = {math_match(completion, "7").answer for completion in same}
    assert len(answers) == 1, answers
    assert None not in answers


def test_other_answers_are_other_votes_and_none_is_no_vote() -> None:
    different = ("50", r"50\%", "0.333", "1/3", "x", "y", "52_8", "x+x", "2x")
    assert len({math_match(boxed(answer), "7").answer for answer in different}) == len(different)
    assert math_match("I do not know", "7").answer is None
