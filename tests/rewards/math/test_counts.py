"""Numbers that are more than their digits: dozens, sums of money, leading zeros, Roman numerals, several units."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify

ROMAN = dict(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    )
)


def right(answer: object, reference: object) -> bool:
    return verify(rf"\boxed{{{answer}}}", reference).outcome is Outcome.CORRECT


def roman(number: int) -> str:
    text = ""
    for value, letters in ROMAN.items():
        text, number = text + letters * (number // value), number % value
    return text


def test_a_dozen_is_twelve() -> None:
    rng = random.Random(0)
    for _ in range(60):
        n = rng.randrange(2, 30)
        dozens = rng.choice(
            ("{} dozen", r"{}\text{{ dozen}}", "{} dozens", "{} dozen eggs", r"{} \text{{ dozen eggs}}")
        )
        assert right(dozens.format(n), 12 * n)
        assert not right(dozens.format(n), n)
        assert right(12 * n, dozens.format(n))
        assert not right(n, dozens.format(n))
        assert verify(f"The answer is {n} dozen.", 12 * n).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("text", "value"), [("a dozen", 12), ("half a dozen", 6), ("2.5 dozen", 30), ("two dozen", 24)]
)
def test_parts_of_dozens_in_words(text: str, value: int) -> None:
    assert right(text, value)
    assert not right(text, value // 12 or 12)


def test_dozens_in_a_calculation_keep_their_number() -> None:
    assert verify("So that's 84/12 = 7 dozen eggs", 7).outcome is Outcome.CORRECT


def test_a_sum_of_money_is_one_number_and_no_list() -> None:
    rng = random.Random(1)
    for _ in range(60):
        value = rng.randrange(1, 10 ** rng.randrange(4, 10))
        written = f"{value:,}".replace(",", rng.choice((",", r",\!", "{,}")))
        sign = rng.choice((r"\$", "€", "£", r"\$ "))
        assert right(value, sign + written)
        assert right(rf"x = \${written}", rf"\${written}")
        if "," in f"{value:,}":
            parts = ", ".join(str(int(part)) for part in f"{value:,}".split(","))
            assert not right(parts, sign + written), (parts, sign + written)
            assert not right(parts, rf"x = \${written}"), (parts, written)
            assert not right(parts, f"{written} dollars"), (parts, sign + written)
    assert right(r"\$1,000, \$2,000", r"\$2,000, \$1,000")


def test_a_group_of_thousands_does_not_begin_with_zero() -> None:
    rng = random.Random(2)
    for _ in range(60):
        n = rng.randrange(1, 1000)
        written = rng.choice(("0,{:03}", "00,{:03}", "0{{,}}{:03}", r"0\,{:03}", "0 {:03}", "01,{:03}")).format(n)
        assert not right(written, n), written
        assert not right(written, 1000 + n), written
        assert verify(f"It is {written}.", n).outcome is not Outcome.CORRECT or not written.startswith("0,")
    assert right("1,023", 1023)
    assert right("(0,318)", "(0, 318)")


def test_roman_numerals_are_equal_if_they_are_the_same() -> None:
    rng = random.Random(3)
    pairs = [(4, 6), (9, 11), (40, 60), (90, 110), (14, 16), (400, 600), (900, 1100), (19, 21)]
    for a, b in [*pairs, *(rng.sample(range(2, 4000), 2) for _ in range(60))]:
        if len(roman(a)) < 2 or len(roman(b)) < 2:
            continue
        dress = rng.choice(("{}", r"\text{{{}}}", r"\mathrm{{{}}}"))
        assert right(dress.format(roman(a)), roman(a))
        assert not right(dress.format(roman(b)), roman(a)), (a, b)
        assert not right(f"I, {roman(b)}", f"I, {roman(a)}"), (a, b)


def test_letters_in_formulas_are_still_factors() -> None:
    assert right("P = VI", "P = IV")
    assert right("yx", "xy")
    assert right("by + ax", "ax + by")


UNITS = (
    (("feet", "ft", "ft."), ("inches", "in", "in.")),
    (("hours", "hr", "h"), ("minutes", "min", "mins")),
    (("pounds", "lb", "lbs"), ("ounces", "oz")),
    (("weeks",), ("days",)),
    (("years",), ("months",)),
    (("meters", "m"), ("centimeters", "cm")),
)


def test_a_quantity_of_two_units_is_compared_part_by_part() -> None:
    rng = random.Random(4)
    for _ in range(80):
        large, small = rng.choice(UNITS)
        a, b = rng.randrange(2, 12), rng.randrange(1, 12)
        reference = f"{a} {large[0]} {b} {small[0]}"
        between = rng.choice((" ", " and ", ", "))
        text = rng.choice((" {}", r"\text{{ {}}}")).format
        answer = f"{a}{text(rng.choice(large))}{between}{b}{text(rng.choice(small))}"
        assert right(answer, reference), (answer, reference)
        for other in (
            f"{a} {large[0]} {b + 1} {small[0]}",
            f"{a + 1} {large[0]} {b} {small[0]}",
            str(a),
            str(b),
            "x^2",
        ):
            assert verify(rf"\boxed{{{other}}}", reference).outcome is Outcome.WRONG, (other, reference)
        assert not right(reference, a)
    assert right("6'4\"", "6 feet 4 inches")
    assert not right("3 apples 4 oranges", "3 apples 5 oranges")
    assert right("3 apples, 4 oranges", "4 oranges, 3 apples")


@pytest.mark.parametrize(("a", "b"), [("5 apples", "5 oranges"), ("7 quibs", "7 zorbs"), (r"9\text{ cats}", "9 dogs")])
def test_units_of_no_known_kind_are_not_equal_to_each_other(a: str, b: str) -> None:
    assert not right(a, b)
    assert right(a, a)
    assert right(a, b.split()[0])


def test_yes_and_no_are_words_and_on_is_another() -> None:
    assert right("No", "no")
    assert not right("on", "no")
