"""What the reward functions promise. Oracles are exact fractions and brute force, never the code under test."""

from __future__ import annotations

import random
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lora.rewards import (
    RewardError,
    Score,
    Unscorable,
    WeightedSum,
    format_match,
    length_reward,
    numeric_match,
    resolve,
    score,
)

NOT_DIGITS = st.text(
    st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="+-\N{MINUS SIGN}.,/eE"), max_size=30
)


def value(completion: str, reference: Any, **options: Any) -> float:
    result = numeric_match(completion, reference, **options)
    assert result.success is (result.value == 1.0)
    return result.value


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("85", 85),
        ("The answer is 85.", 85),
        ("**73**", 73),
        ("47 + 38 = 85", 85),
        ("47+38=85", "85"),
        ("85.0", 85),
        ("085", 85),
        ("-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("**-73**", -73),
        ("x = -3", -3),
        ("5-3", 3),
        ("5--3", -3),
        ("--5", 5),
        ("+-5", -5),
        ("$1,234.50", "1234.5"),
        ("1,234,567", 1234567),
        ("12 eggs, then 7", 7),
        ("it is...5", 5),
        (".5", 0.5),
        ("0.1", 0.1),
        ("0.3", Decimal("0.3")),
        ("1e3", 1000),
        ("2.5e-1", 0.25),
        ("2.5e\N{MINUS SIGN}1", 0.25),
        ("1ex5", 5),
        (f"-{10**40 + 1}", -(10**40) - 1),
        ("0", -0.0),
        ("72", "He sold 48/2 = 24 clips in May. 48 + 24 = 72.\n#### 72"),
        ("1200", "#### 1,200"),
        ("-12", "#### \N{MINUS SIGN}12"),
        ("so 3/4 of 100, that is 75", 75),
        ("85\n\n", 85),
    ],
)
def test_the_last_number_is_found_and_compared(completion: str, reference: Any) -> None:
    assert value(completion, reference) == 1.0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("", 0),
        ("no number here", 0),
        ("85 or 86", 85),
        ("5", -5),
        ("-5", 5),
        ("1,23", 123),
        ("1,2345", 12345),
        ("1,234", 1),
        ("0.10000000000000000000000000001", 0.1),
        ("9007199254740993", 9007199254740992),
        ("3/4", 4),
        ("1/2", 2),
        ("1e400", 1),
        ("1e", 2),
        ("1.2.3", 2),
        ("\N{FULLWIDTH DIGIT EIGHT}5", 5),
        ("5\N{ARABIC-INDIC DIGIT THREE}", 5),
        ("\N{ARABIC-INDIC DIGIT EIGHT}\N{ARABIC-INDIC DIGIT FIVE}", 85),
        ("\N{SUPERSCRIPT TWO}", 2),
    ],
)
def test_what_is_not_the_number_scores_zero(completion: str, reference: Any) -> None:
    assert value(completion, reference) == 0.0


@given(
    st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40), NOT_DIGITS, NOT_DIGITS, st.sampled_from(["", ","])
)
def test_any_integer_in_any_text_is_read_exactly(a: int, b: int, before: str, after: str, separator: str) -> None:
    completion = f"{before} {a:{separator}}{after}"
    assert value(completion, a) == 1.0
    assert value(completion, b) == float(a == b)


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6),
)
def test_decimals_compare_as_fractions_do(a: Decimal, b: Decimal) -> None:
    assert value(f"= {a:f}", str(b)) == float(Fraction(a) == Fraction(b))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reference_is_the_number_that_was_written(x: float) -> None:
    assert value(repr(x), x) == 1.0


@pytest.mark.parametrize(
    ("completion", "correct"),
    [("85", True), ("+85\n", True), ("-85", False), ("85.0 ", True), ("85.", False), ("x85", False), ("85 85", False)],
)
def test_strict_wants_nothing_but_the_number(completion: str, correct: bool) -> None:
    assert value(completion, 85, strict=True) == float(correct)


@pytest.mark.parametrize("reference", [None, True, "", "none", "3/4", "3 or 4", float("nan"), float("inf"), [85]])
def test_a_reference_that_is_not_one_number_is_an_error_not_a_zero(reference: Any) -> None:
    with pytest.raises(ValueError, match="needs one number as reference"):
        numeric_match("85", reference)


ATTACKS = {
    "digits": "9" * 2**20,
    "grouped": "1" + ",111" * 2**18,
    "almost grouped": "1" + ",111" * 2**18 + "1",
    "decimals": "1." + "3" * 2**20,
    "points": "1." * 2**19,
    "fractions": "1/" * 2**19 + "1",
    "signs": "-" * 2**20 + "5",
    "alternating signs": "+-" * 2**19 + "5",
    "exponent": "1e999999999999999999",
    "exponent out of range": "1e" + "9" * 3000,
    "negative exponent": "1e-999999999999999999",
    "exponents": "1e1" * 2**18,
    "unicode digits": "\N{ARABIC-INDIC DIGIT THREE}" * 2**20,
    "mixed digits": "3\N{ARABIC-INDIC DIGIT THREE}" * 2**19,
    "digits spoiled at the end": "3" * 4000 + "\N{ARABIC-INDIC DIGIT THREE}",
    "spaces": " " * 2**20,
    "numbers": "7 " * 2**19,
    "zero bytes": "\0" * 2**20,
    "lone surrogates": "\ud800" * 2**20,
    "brackets": "(" * 2**20,
    "tower": "9**" * 2**18 + "9",
    "payload": "__import__('os').system('exit 1')",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_text_is_slow_or_crashes(name: str) -> None:
    text = ATTACKS[name]
    start = time.process_time()
    for strict in (False, True):
        assert value(text, 85, strict=strict) == 0.0
    format_match(text, None)
    length_reward(text, None)
    assert time.process_time() - start < 2.0  # quadratic work would take minutes


def test_the_end_of_a_huge_text_still_counts_and_a_cut_number_does_not() -> None:
    assert value("7 " * 2**19 + "85", 85) == 1.0
    assert value("x" * 2**20 + " 85 " + "y" * 4000, 85) == 1.0
    assert all(value("1" * k + "85" + " " * 4095, reference) == 0.0 for k in (0, 1, 50) for reference in (5, 85))


@settings(max_examples=300)
@given(
    st.text(st.sampled_from("0123456789+-\N{MINUS SIGN}.,/eE*()$% x\u0663\uff18½²\n"), max_size=60),
    st.integers(-20, 20),
)
def test_numeric_always_answers_zero_or_one(text: str, reference: int) -> None:
    assert value(text, reference) in (0.0, 1.0)
    assert value(text, reference, strict=True) <= value(text, reference)


def test_a_thousand_plain_verdicts_take_less_than_a_second() -> None:
    rng = random.Random(0)
    completions = [f"The sum of {rng.randrange(99)} and {rng.randrange(99)} is **{rng.randrange(198)}**."] * 1000
    start = time.process_time()
    for completion in completions:
        numeric_match(completion, 85)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("completion", "matches"),
    [
        ("85", 1),
        (" 85.\n", 1),
        ("-8,500.25", 1),
        ("the 85", 0),
        ("85 eggs", 0),
        ("x85", 0),
        ("1ex5", 0),
        ("", 0),
        ("8 5", 0),
    ],
)
def test_the_default_format_is_just_a_number(completion: str, matches: int) -> None:
    assert format_match(completion, "whatever") == matches


def test_format_matches_the_whole_completion() -> None:
    pattern = r"(?s)<think>.*</think>\s*\d+"
    assert format_match("<think>a\nb</think> 5", pattern=pattern) == 1.0
    assert format_match("<think>a\nb</think> 5!", pattern=pattern) == 0.0
    with pytest.raises(ValueError, match="regular expression"):
        format_match("5", pattern="(")


@given(st.integers(0, 300), st.integers(0, 100), st.integers(1, 100))
def test_length_falls_linearly_from_target_to_limit(n: int, target: int, span: int) -> None:
    got = length_reward("x" * n, target=target, limit=target + span)
    if n <= target:
        assert got == 1.0
    elif n >= target + span:
        assert got == 0.0
    else:
        assert got == pytest.approx(float(1 - Fraction(n - target, span)))


@pytest.mark.parametrize(("target", "limit"), [(-1, 5), (5, 5), (6, 5)])
def test_length_refuses_bounds_that_make_no_slope(target: int, limit: int) -> None:
    with pytest.raises(ValueError, match="target < limit"):
        length_reward("", target=target, limit=limit)


# ---- configuration -> function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numeric", "format", "length"])
def test_every_built_in_is_found_by_name(name: str) -> None:
    assert score(resolve(name), "85", 85).value == 1.0


def test_a_weighted_sum_reports_unweighted_parts_and_the_first_verdict() -> None:
    reward = resolve(
        {
            "length": {"weight": -0.5, "target": 1, "limit": 3},
            "numeric": 1,
            "format": {"weight": 0, "pattern": "[a-z ]+85"},
        }
    )
    result = score(reward, "85", 85)
    assert result == Score(0.75, {"length": 0.5, "numeric": 1.0, "format": 0.0}, True, "85")
    assert score(reward, "the 85", 86) == Score(0.0, {"length": 0.0, "numeric": 0.0, "format": 1.0}, False, "85")


def test_options_reach_a_built_in() -> None:
    assert score(resolve({"numeric": {"strict": True}}), "= 85", 85).value == 0.0
    assert score(resolve({"numeric": {}}), "= 85", 85).value == 1.0


def test_parts_of_parts_are_kept_under_their_name() -> None:
    inner = resolve({"numeric": 2.0, "format": 1.0})
    outer = WeightedSum((type(inner.parts[0])("both", inner, 1.0),))  # type: ignore[attr-defined]
    assert score(outer, "85", 85).parts == {"both": 3.0, "both/numeric": 1.0, "both/format": 1.0}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from rewards import Unscorable\n"
        "LIMIT = 5\n"
        "def same(completion, reference): return float(completion == reference)\n"
        "def scaled(completion, reference, *, by=1.0): return by\n"
        "def none(): return 1.0\n"
        "def lost(completion, reference): raise Unscorable('timed out')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def test_a_function_of_ones_own_is_found_in_the_working_directory(own_module: str) -> None:
    assert score(resolve(f"{own_module}:same"), "a", "a").value == 1.0
    reward = resolve({f"{own_module}:scaled": {"weight": 2, "by": 3.0}, "format": 0})
    assert score(reward, "", None) == Score(6.0, {f"{own_module}:scaled": 3.0, "format": 0.0})


def test_a_callable_is_taken_as_it_is() -> None:
    def own(completion: str, reference: Any) -> float:
        return 0.25

    assert resolve(own) is own


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numerc", "no reward is called 'numerc'; there are format, length, math, numeric and 'module:function'"),
        ("", "no reward is called ''"),
        (":same", "'module:function'"),
        ("OWN:", "'module:function'"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("OWN:sane", "nothing called 'sane'; functions: lost, none, same, scaled"),
        ("OWN:LIMIT", "no function, but a int, called 'LIMIT'"),
        ("OWN:none", r"cannot be called with \(completion, reference\)"),
        ({"OWN:scaled": {"buy": 2}}, r"'buy'.*by=1.0"),
        ({}, "at least one part"),
        ({"numeric": "much"}, "weight of reward 'numeric' must be a finite number, got 'much'"),
        ({"numeric": float("nan")}, "finite number"),
        ({"numeric": True}, "finite number"),
        ({"numeric": None}, "finite number"),
        ({"numeric": {"strikt": True}}, r"'strikt'.*strict"),
        ({"format": {"pattern": "("}}, r"'format'.*regular expression"),
        ({"format": {"pattern": 5}}, r"'format'.*regular expression"),
        ({"length": {"target": 9, "limit": 3}}, "target < limit"),
        ({"length": {"target": "far"}}, "'length'"),
        ({5: 1.0}, "no reward is called 5"),
        ([], "must be a name, 'module:function', a mapping, a list or a function"),
        (["numerc"], "no reward is called 'numerc'"),
        (None, "must be a name"),
    ],
)
def test_a_bad_specification_is_refused_saying_what_there_is(own_module: str, spec: Any, message: str) -> None:
    if isinstance(spec, str):
        spec = spec.replace("OWN", own_module)
    elif isinstance(spec, dict):
        spec = {str(k).replace("OWN", own_module) if isinstance(k, str) else k: v for k, v in spec.items()}
    with pytest.raises(ValueError, match=message):
        resolve(spec)


# ---- what went wrong is never a number --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_one_unscorable_part_makes_the_whole_unscorable(own_module: str, weight: float) -> None:
    reward = resolve({"numeric": 1.0, f"{own_module}:lost": weight})
    with pytest.raises(Unscorable, match="timed out"):
        score(reward, "85", 85)


@pytest.mark.parametrize("returned", [float("nan"), float("inf"), None, "1.0", [1.0], 1j, 10**400])
def test_what_is_no_finite_number_is_refused_naming_the_function(returned: Any) -> None:
    def broken(completion: str, reference: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match="broken"):
        score(broken, "", None)
    with pytest.raises(RewardError, match="part_name"):
        score(WeightedSum((type(resolve({"numeric": 1}).parts[0])("part_name", broken, 0.0),)), "", None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("parts", [{}, {"a": float("nan")}])
def test_a_score_is_finite(parts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Score(0.0 if parts else float("inf"), parts)


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    for returned in (numpy.float32(0.5), numpy.array(0.5), Fraction(1, 2), Decimal("0.5")):
        assert score(lambda c, r, x=returned: x, "", None).value == 0.5
    assert score(lambda c, r: True, "", None).value == 1.0


def test_a_failure_inside_a_reward_function_names_it_and_keeps_its_cause() -> None:
    def failing(completion: str, reference: Any) -> float:
        return float({"a": 1.0}["key"])

    with pytest.raises(RewardError, match=r"failing raised KeyError: 'key'") as caught:
        score(failing, "", None)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so 085", "85"),
        ("85.0", "85"),
        ("1,250", "1250"),
        ("-.50", "-0.5"),
        ("0.000", "0"),
        ("-0", "0"),
        ("2e3", "2000"),
    ],
)
def test_equal_numbers_are_one_answer(completion: str, answer: str) -> None:
    assert numeric_match(completion, 1).answer == answer


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_the_spelling_of_a_number_is_that_number(number: Decimal) -> None:
    answer = numeric_match(f"it is {number}", 1).answer
    assert answer is not None
    assert Decimal(answer) == number
    assert answer == numeric_match(f"it is {number}000", 1).answer


def test_no_number_is_no_answer_and_a_huge_one_is_a_short_text() -> None:
    assert numeric_match("none", 1).answer is None
    assert numeric_match("3/4", 1).answer is None
    assert numeric_match("1e99999", 1).answer == "1E+99999"
