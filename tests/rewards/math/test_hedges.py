"""An answer that settles on no value earns nothing; one that only sounds so keeps what it earned."""

from __future__ import annotations

import random
import time

import pytest

from rl_lora.rewards import Outcome, verify

LEADS = ("The answer is", "The final answer is", "Final answer:", "**Answer:**", "So the correct answer is")
SEVERAL = (
    "either {} or {}",
    "between {} and {}",
    "somewhere between {} and {}",
    "from {} to {}",
    "some number from {} to {}",
    "in the range {} to {}",
    "both {} and {}",
    "could be {}, could be {}",
    "perhaps {}, perhaps {}",
    "maybe {} or {}",
    "possibly {} or maybe {}",
    "one of {}, {}",
    "{} or {}",
    "{}, maybe {}",
    "{} (or perhaps {})",
    "{} but it could be {}",
    "neither {} nor {}",
    "among {} and {}",
    "a choice of {} and {}",
)
REFUSED = (
    "not {}",
    "certainly not {}",
    "surely never {}",
    "definitely not equal to {}",
    "by no means {}",
    "anything but {}",
    "greater than {}",
    "less than {}",
    "strictly less than or equal to {}",
    "no more than {}",
    "at least {}",
    "at most {}",
    "above {}",
    "a number below {}",
    "something other than {}",
    "up to {}",
    "hardly {}",
    "unlikely to be {}",
    "definitely different from {}",
    "bounded by {}",
    "in no case {}",
    "well above {}",
    "a bit more than {}",
    "_not_ {}",
)
VALUES = ("{}", "${}$", "{} apples", "**{}**", r"$\sqrt{{{}}}$", "${}")


def right(completion: str, reference: object) -> bool:
    return verify(completion, reference).outcome is Outcome.CORRECT


@pytest.mark.parametrize("hedge", SEVERAL)
def test_several_values_are_no_answer(hedge: str) -> None:
    rng = random.Random(hedge)
    for _ in range(12):
        a, b = rng.sample(range(60), 2)
        form = rng.choice(VALUES)
        text = f"{rng.choice(LEADS)} {hedge.format(form.format(a), form.format(b))}."
        for value in (a, b):
            reference = rf"\sqrt{{{value}}}" if "sqrt" in form else value
            assert not right(text, reference), (text, reference)


@pytest.mark.parametrize("hedge", REFUSED)
def test_a_denied_value_or_a_bound_is_no_answer(hedge: str) -> None:
    rng = random.Random(hedge)
    for value in (0, *rng.sample(range(60), 12)):
        form = rng.choice(VALUES)
        text = f"{rng.choice(LEADS)} {hedge.format(form.format(value))}."
        assert not right(text, rf"\sqrt{{{value}}}" if "sqrt" in form else value), text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer could be 14 or 23.", 23),
        ("The answer might be 14, or it might be 23.", 23),
        ("The answer cannot be 36.", 36),
        ("The answer isn't 36.", 36),
        ("It is either 14 or 23.", 23),
        ("So the number is greater than 19.", 19),
        ("The total is not 5.", 5),
    ],
)
def test_other_ways_to_settle_on_nothing(text: str, value: int) -> None:
    assert not right(text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer could be 14.", 14),
        ("The answer cannot be 36. So it is 37.", 37),
        ("The answer is probably 14.", 14),
        ("The answer is approximately 14.", 14),
        ("The answer is 14, maybe more if it rains.", 14),
        ("The answer is 5, not 6.", 5),
        ("The answer is none other than 5.", 5),
        ("The answer is 5 because it cannot be 6.", 5),
        ("The answer is the difference between 20 and 13: 7", 7),
        ("The answer is that she needs at least 5 boxes.", 5),
        ("The answer is that it takes 1 hour or 60 minutes.", 60),
        ("The answer is either 1/2 or 0.5.", 0.5),
        ("The answer is either 14 or 23.", "14, 23"),
        ("It is not 5, it is 7.", 7),
        ("She needs at least 5.", 5),
        ("We divide both sides by 5 and get 100/5 or 20.", 20),
    ],
)
def test_what_settles_on_a_value_is_still_an_answer(text: str, value: object) -> None:
    assert right(text, value)


def test_spaces_and_line_breaks_behind_an_answer_are_read_once() -> None:
    start = time.process_time()
    assert not right("The answer is " + "\n$" * 450, 3)
    assert time.process_time() - start < 0.5


def test_long_lines_are_not_searched_for_hedges() -> None:
    assert not right("The answer is either " + "1 or " * 4000 + "2.", 3)
