"""Times of day are compared as times, wherever they stand."""

from __future__ import annotations

import random

import pytest

from rl_lora.rewards import Outcome, verify

PLACES = (r"\boxed{{{}}}", "The answer is {}.", "So the film ends at {}.", "#### {}", "<answer>{}</answer>", "{}")


def right(completion: str, reference: str) -> bool:
    return verify(completion, reference).outcome is Outcome.CORRECT


def written(rng: random.Random, minute: int) -> str:
    """One way to write a minute of the day so that only that minute can be meant."""
    hour, rest = divmod(minute, 60)
    half = "pm" if hour >= 12 else "am"
    half = rng.choice((half, half.upper(), f"{half[0]}.m.", f"{half[0].upper()}.M.", rf"\text{{ {half}}}"))
    gap = "" if half.startswith("\\") else rng.choice((" ", ""))
    twelve = (hour - 1) % 12 + 1
    forms = [f"{twelve}:{rest:02}{gap}{half}", f"{twelve:02}:{rest:02}{gap}{half}"]
    forms += [f"{twelve} {half}"] if not rest and gap else []
    forms += [f"{hour}:{rest:02}"] if hour > 12 else []
    return rng.choice(forms)


def test_two_times_are_equal_if_they_are_one_minute_of_the_day() -> None:
    rng = random.Random(0)
    for _ in range(300):
        minute = rng.choice((60 * rng.randrange(24), rng.randrange(1440)))
        other = rng.choice(((minute + 720) % 1440, 60 * rng.randrange(24), rng.randrange(1440)))
        place = rng.choice(PLACES)
        answer, same, different = written(rng, minute), written(rng, minute), written(rng, other)
        if {answer, same} & {"noon", "midnight"}:
            continue
        assert right(place.format(answer), same), (place, answer, same)
        assert right(place.format(answer), different) == (minute == other), (place, answer, different)


def test_times_that_name_no_half_of_the_day_are_equal_if_they_are_written_so() -> None:
    rng = random.Random(1)
    for _ in range(300):
        hour, other = rng.randrange(1, 13), rng.randrange(1, 13)
        minute, another = rng.choice((0, rng.randrange(60))), rng.choice((0, rng.randrange(60)))
        place, reference = rng.choice(PLACES), f"{other}:{another:02}{rng.choice(('', ' pm', ' a.m.'))}"
        equal = (hour, minute) == (other, another)
        assert right(place.format(f"{hour}:{minute:02}"), reference) == equal, (hour, minute, reference)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("noon", "12:00 pm", True),
        ("midnight", "0:00", True),
        ("9 o'clock", "9:00", True),
        ("9 o'clock", "10:00", False),
        ("8:30 in the morning", "8:30 am", True),
        ("8:30 in the evening", "8:30 am", False),
        ("12:30 am", "0:30", True),
        ("12:30 am", "12:30 pm", False),
        ("t = 5:00", "5:00", True),
        ("t = 5:00", "6:00", False),
        ("8:00, 11:00", "8:00, 10:00", False),
        ("5:00", "5", False),
        ("5 pm", "5", True),
        ("3:05", "3/5", False),
        ("6:8", "3:4", True),
    ],
)
def test_a_time_is_a_time_in_any_words_and_no_number(answer: str, reference: str, equal: bool) -> None:
    assert right(rf"\boxed{{{answer}}}", reference) == equal


def test_a_time_behind_dollars_or_stars_keeps_its_half_of_the_day() -> None:
    for dressed in ("$9:00$ PM", "**9:00** PM", "$9:00$ p.m.", r"$9:00\text{ PM}$"):
        for sentence in ("So the film ends at {}.", "The answer is {}."):
            assert right(sentence.format(dressed), "9:00 PM")
            assert not right(sentence.format(dressed), "9:00 AM")


def test_parts_of_the_day_in_words_count_in_prose() -> None:
    assert right("He finishes at 4:05 in the afternoon.", "4:05 pm")
    assert not right("He finishes at 4:05 in the afternoon.", "4:05 am")
    assert right("He finishes at 12 noon.", "12:00 pm")
    assert right("Time: 12:00", "12:00")


def test_a_label_before_a_colon_is_no_time() -> None:
    assert right("Week 1:40 pages", "40")
