"""What the math verifier promises of units and nouns behind numbers: which words leave a number as it is, and which
make another one of it. Random numbers and words; the oracle is the number that was put in."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify

RIGHT, WRONG = Outcome.CORRECT, Outcome.WRONG
NOUNS = "apples marbles crayons students seashells cupcakes stamps trees coins tickets children buses foxes ponies"
PHRASES = """
    slices of bread|bags of flour|times|left|cm long|feet tall|years old|cats and dogs|pieces of chalk|GB|more apples
    apples in each basket|dollars per week|in total|in all|more tickets than Tom|balloons left over|boys and girls
    for each child|of them|red balls|different ways|people in the room|o'clock trains|meters away|books altogether
    loaves of home-made bread|students' desks|minutes longer|each|miles from home|chairs at the back|extra minutes
    seconds faster|times as many|years from now|points on the test|hot dogs|square tiles|fourth graders|pounds of rice
""".replace("\n", "|").split("|")
OTHER_VALUES = """
    and a half|and a half slices|hundred|thousand apples|million|dozen eggs|dozens|thirds|halves|x|n apples|or more
    or so|at least|at most|less than twelve|more than seven|times seven|plus two|minus one apple|squared|cubed
    not counting|or 7 apples|and 7 apples|to 9|percent of x|below zero|factorial|mod seven|is wrong|was not it
    tenths|divided by two|times 3|half|maximum|pi|sqrt|base seven|apples and 3 pears|by 6|choose two|quarters
    mil|millones|and counting|over two|to the power two|theta|alpha beta
""".replace("\n", "|").split("|")
PLACES = (r"\boxed{{{}}}", "#### {}", "<answer>{}</answer>", "The answer is {}.", "Final answer: {}", r"\boxed{{{}.}}")


def cases(words: list[str], n: int, seed: int) -> list[tuple[str, str, int]]:
    draw = random.Random(seed)
    phrases = [word.strip() for word in words if word.strip()]
    picked = [*phrases, *(draw.choice(phrases) for _ in range(max(0, n - len(phrases))))]
    return [(phrase, draw.choice(PLACES), draw.randrange(2, 999)) for phrase in picked]


def outcome(completion: str, reference: object) -> Outcome:
    return verify(completion, reference).outcome


def test_a_number_with_a_noun_phrase_is_the_number() -> None:
    for phrase, place, n in cases(PHRASES, 200, 0):
        for text in (f"{n} {phrase}", rf"{n}\text{{ {phrase}}}"):
            completion = place.format(text)
            assert outcome(completion, n) is RIGHT, completion
            assert outcome(completion, n + 1) is WRONG, completion


def test_words_that_make_another_value_are_not_ignored() -> None:
    for phrase, _, n in cases(OTHER_VALUES, 200, 1):
        for completion in (rf"\boxed{{{n} {phrase}}}", f"#### {n} {phrase}", rf"\boxed{{{n} \text{{ {phrase}}}}}"):
            assert outcome(completion, n) is not RIGHT, completion


def test_a_reference_with_its_unit_in_parentheses_is_readable() -> None:
    """MAWPS and ASDiv write "9 (apples)"; the number is right with the unit in any dress, or without it."""
    draw = random.Random(2)
    units = [
        *NOUNS.split(),
        "km",
        "square meters",
        "apples per basket",
        "$",
        "years old",
        "m/s",
        "fourth graders",
        "cm^2",
    ]
    for _ in range(300):
        n, unit = (
            draw.choice((draw.randrange(999), f"{draw.randrange(1, 99)}.{draw.randrange(1, 99)}")),
            draw.choice(units),
        )
        number = f"{n}"
        reference = draw.choice((f"{number} ({unit})", f"{number}({unit})", rf"{number}\ (\text{{{unit}}})"))
        for answer in (number, f"{number} {unit}", f"{number} ({unit})", rf"{number}\text{{ {unit}}}"):
            assert outcome(rf"So \boxed{{{answer}}}", reference) is RIGHT, (answer, reference)
        assert outcome(f"The answer is {number}.", reference) is RIGHT, reference
        assert outcome(f"It is {number}7.", reference) is WRONG, reference
        assert outcome(r"\boxed{x+y}", reference) is WRONG, reference


def test_what_stands_in_parentheses_and_is_no_unit_is_a_factor() -> None:
    for answer in ("5 (x)", "5(x)", "5 (3)", "5 (x+1)", "5(ab)", "5 (at least)", "5 (half)", "5 (not 6)", "5 (or 6)"):
        assert outcome(rf"\boxed{{{answer}}}", "5") is not RIGHT, answer
        assert outcome(r"\boxed{5}", answer) is not RIGHT, answer


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("8 pounds", "£8", True),
        ("8 pounds", "8 lb", True),
        ("£8", "8 lb", False),
        ("60¢", "60 cents", True),
        ("60¢", r"\$60", False),
        (r"9\,\text{m s}^{-1}", "9 m/s", True),
        (r"9\,\frac{\text{m}}{\text{s}}", "9 m/s", True),
        (r"9\,\text{m}\,\text{s}^{-1}", "9 meters per second", True),
        (r"9\,\text{m s}^{-2}", "9 m/s", False),
        (r"9\;\mathrm{km\,h^{-1}}", "9 km/h", True),
        (r"9\,\text{m/s}^2", "9 m/s^2", True),
        ("9 kmh", "9 km/h", True),
        ("9 mph", "9 miles an hour", True),
        ("9 mph", "9 km/h", False),
        ("64 GB", "64 MB", False),
        ("64 gigabytes", "64 GB", True),
        ("15 square feet", "15 ft^2", True),
        ("15 feet squared", "15 ft^2", True),
        ("15 square feet", "15 ft", False),
        (r"20\text{ N}", "20", True),
        (r"20^\circ C", r"20^\circ F", False),
        (r"20^\circ C", "20 degrees Celsius", True),
        (r"20^\circ", "20 degrees Celsius", True),
        ("14 slices", "14 (slices of bread)", True),
        ("14 slices of bread", "14 (bread slices)", True),
        ("14 eggs", "14 (hens)", False),
        ("14 red balls", "14 (red cars)", False),
        ("14 children", "14 (child)", True),
        ("14 left", "14 (apples)", True),
        ("14 boxes", "14 (box)", True),
        (r"7^{\text{th}}", "7", True),
        (r"21^\text{st}", "21", True),
        ("22nd", "22", True),
        (r"7^{th}", "8", False),
        (r"7^{t}", "7", False),
        ("5 hundred thousand people", "500000", True),
        (r"\$5 million", "5000000", True),
    ],
)
def test_units_are_compared_by_what_they_mean(answer: str, reference: str, right: bool) -> None:
    assert (outcome(rf"\boxed{{{answer}}}", reference) is RIGHT) == right
    assert (outcome(rf"\boxed{{{reference}}}", answer) is RIGHT) == right
