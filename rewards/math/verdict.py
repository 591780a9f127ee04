r"""The math verifier: is the answer in a completion mathematically the reference?

    completion --extraction--> answer --numbers--> exact verdict (plain numbers, text: most answers)
                                      \--workers--> compare, reader, values, Math-Verify (formulas)

Plain numbers and text are judged here and exactly. Formulas are judged in worker processes under a deadline and a cap
of memory. Nothing that a model wrote is ever evaluated as code, in any process.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from typing import Any

from rl_lora.rewards.math import workers
from rl_lora.rewards.math.cleaning import clean
from rl_lora.rewards.math.clocks import Clock, clock
from rl_lora.rewards.math.compounds import Compound, compound, same_compound
from rl_lora.rewards.math.extraction import boxed, extract, methods_of
from rl_lora.rewards.math.numbers import Quantity, quantity
from rl_lora.rewards.math.prose import told
from rl_lora.rewards.math.text import base_numeral, canonical, choice, chosen, nothing, ratio, roman, same_ratio, words
from rl_lora.rewards.score import Score, Unscorable

MAX_ANSWER_CHARS = 1000
MAX_NESTING = 50
"""Caps of an answer and of a reference: characters, and brackets within brackets."""


class Outcome(enum.Enum):
    """What happened to one completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    UNSCORABLE = "unscorable"


@dataclass(frozen=True)
class Verdict:
    """`answer` is the text that was judged and `method` what found it (None without one); `reason` says why a verdict
    is UNSCORABLE, or WRONG for another reason than its value."""

    outcome: Outcome
    answer: str | None = None
    method: str | None = None
    reason: str = ""


def math_match(
    completion: str, reference: Any = None, *, extract: str | Sequence[str] = "flexible", timeout: float = 5.0
) -> Score:
    """1.0 and success if the completion's answer equals the reference, else 0.0; the built-in reward `math`.

    `parts["answered"]` is 1.0 if an answer was found (so 0.0 tells a missing answer from a wrong one). Everything else
    is as for `verify`.

    Raises:
        Unscorable: no verdict (deadline, memory, a reference that cannot be read). The episode is left out and counted.
        ValueError: as `verify`.
    """
    verdict = verify(completion, reference, extract=extract, timeout=timeout)
    if verdict.outcome is Outcome.UNSCORABLE:
        raise Unscorable(verdict.reason)
    correct = verdict.outcome is Outcome.CORRECT
    parts = {"answered": float(verdict.outcome is not Outcome.NO_ANSWER)}
    return Score(float(correct), parts, correct, None if verdict.answer is None else spelling(verdict.answer))


def spelling(answer: str) -> str:
    """One text for answers that are the same at sight: plain numbers by their value (of units only % is kept: a unit
    that is left out is no other answer), choices by their letter, names in lower case, formulas without what only
    changes their looks. Formulas are not computed: 2x and x + x remain two answers."""
    text = clean(answer[:MAX_ANSWER_CHARS])
    number = quantity(text)
    if number is not None:
        return f"{number.value}{'%' if number.unit == '%' else ''}"
    return choice(text) or words(text) or canonical(text)


def verify(
    completion: str, reference: Any, *, extract: str | Sequence[str] = "flexible", timeout: float = 5.0
) -> Verdict:
    r"""Judge one completion.

    **Where the answer stands.** `extract` names the methods, tried in order; the first whose place exists decides:

    - "boxed": the last `\boxed{...}`, `\fbox{...}` or `\boxed 5`. Empty or never closed: no answer. Boxes with
      nothing but a comma, "and" or "or" between them are one list, so that "\boxed{18} or \boxed{17}" is not 17
      (but "\boxed{0.4} or \boxed{2/5}" is 0.4).
    - "hash": behind the last `#### ` on its line; markdown headings are not answers.
    - "tag": the last `<answer>...</answer>`, or the "answer" of a JSON object at the end; never closed, it runs to the
      end.
    - "phrase": behind the last "the answer is" (also "Final answer:", "**Answer:**"), up to the end of the sentence.
      A value that is denied, a bound, changed or one of several there is no answer: "not 36", "greater than 19",
      "almost 19", "twice 19", "14 or 23", "nicht 36"; "about 19" is 19. "not 12 but 17" is 17.
    - "whole": all of a short text that is no sentence: "x^2 + 1", "Yes", "12 eggs"; behind a label: "Total: 19".
    - "last_number": the last number.
    - "last_expression": the last formula in `$...$`, `\(...\)`, `\[...\]` or the last number, whichever ends later;
      not a value that its sentence denies or leaves open ("it is either 14 or 23", "before 7:25"); with the one in
      front where both are one quantity ("5 feet 9 inches"). "84/12 = 7 dozen" is 7 there.

    Of a sentence or a label in such a place ("The answer is 28", "Area: 54", "He has 12 stamps") the one value that it
    names counts, unless it is denied or bounded.

    "strict" is ("boxed", "hash", "tag"): only an answer that is marked as one. "flexible" is all but "last_number".
    A place that is there but empty is no answer, whatever else the text says. Only the last 20,000 characters count,
    and of a text with "</think>" what stands behind it.

    **The reference** is an int, a finite float, Fraction or Decimal, or a text: of one with "####" what stands behind
    it, else of one with `\boxed{}` what that holds, else all of it.

    **What is equal.** Values are compared exactly: 0.333 is not 1/3, and 3.14 is not \pi. Choices made:

    - *Units* are compared, not converted; one on one side only is ignored, also in parentheses: 9 (apples).
      5 cm is not 5 m, nor 15 cm^2 15 cm. Currency signs are units. 5 million is 5000000
      and 4 dozen is 48. 6 feet 4 inches is equal to the same numbers of the same units only.
    - *Nouns* behind a number ("14 slices of bread", "16 left", "8 times") leave it as it is. Two of them must have a
      noun in common: 14 slices, but not 14 eggs. What bounds or changes a number ("5 at most", "5 and a half") counts.
    - *Percent*: a sign on one side only may be read both ways, so 50% equals 50 and equals 0.5; 50% is not 0.5%.
    - *Commas*: 1,234 and 1{,}234 are one number, in formulas too; (1,234) is a pair; 1,23, 0,318 and "1, 234" are two
      numbers. Digits of other scripts are not read.
    - *Assignments*: x = 5 equals 5, as do "Area = 5", f(2) = 5 and AB:CD = 5, and x \in S equals S;
      x = 5 is not y = 5. Equations are equal if one is a multiple of the other; with sums, limits, integrals or
      determinants, if both their sides are equal. An inequality for one name equals its interval. Equations on lines of
      their own or behind \quad are a list, as with commas between them.
    - *Sets*: [0,4]\cup[4,9] is [0,9], t \neq 3 is (-\infty,3)\cup(3,\infty), and \{7,3,3\} is \{3,7\}.
    - *Approximations*: \sqrt{30} \approx 5.48 is either side of it, if the decimal is the value rounded or cut.
    - *Conditions*: 7t for 0 < t < 4 and k \text{ odd} equal the same value under the same condition only.
    - *Lists* bare or in {} are equal in any order, tuples and intervals in theirs, with their brackets; a bare list
      equals a tuple in the same order. A matrix is not a tuple.
    - *No solution*: "no solution", "no real roots", "none" and \emptyset are one answer.
    - *Ratios*: 2:4:6 equals 1:2:3 and 2 to 3 equals 2:3; what could be reduced and has minutes, 3:30, is a time.
    - *Times of day*: 8:40, 08:40 and 8:40 am are one, so are 5 pm, 5:00 p.m. and 17:00; 7:45 am is not 7:45 pm. What
      names no half of the day fits both. A time is no number: 5:00 is not 5.
    - *Angles*: 90^\circ equals 90 and equals \pi/2.
    - *Words*: numbers in words are numbers: thirteen cookies, negative two, three quarters.
    - *Bases*: 52_8 equals itself only, neither 52 nor 42.
    - *Roman numerals* of more than one letter, in capitals, equal themselves only: VI is not IV.
    - *Choices and names*: (A), A, \text{(A)} and "A. 12 cm" are one; names are compared without case.
    - *Logarithms*: \log without a base may be natural or decimal, as either makes it equal.
    - *Variables*: formulas are equal if they agree wherever both are real: sqrt(1/n) = 1/sqrt(n), but
      sqrt(x^2) is not x.

    **No verdict.** A formula that takes longer than `timeout` seconds or too much memory is UNSCORABLE, not wrong: it
    may be the reference that is hard. The price: a model could learn to write such formulas, for an episode left out
    beats one scored 0. So what can be refused beforehand is WRONG instead (more than 1,000 characters, brackets 50
    deep, towers of powers, huge factorials, sums and integrals with huge numerals), and what is left is counted: watch
    the share of unscorable episodes. A reference that no rule can read is UNSCORABLE for every completion that is not
    literally equal.

    Raises:
        ValueError: an unknown method; a time-out that is not positive; a reference of another type, empty, not finite.
        RewardError: no worker can be started (sympy or Math-Verify cannot be imported).
    """
    methods = methods_of(extract)
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    expected = _reference(reference)
    found = _extract(completion, methods)
    if found is None or not found.text.strip("$* \n."):
        return Verdict(Outcome.NO_ANSWER)
    if expected.refused:
        return Verdict(Outcome.UNSCORABLE, found.text, found.method, f"the reference is {expected.refused}")
    verdict = _judged(found.text, found.method, expected, timeout)
    if verdict.outcome is Outcome.WRONG and found.boxes:  # 0.4, or 2/5
        each = [_judged(text, found.method, expected, timeout) for text in found.boxes]
        if all(one.outcome is Outcome.CORRECT for one in each):
            return Verdict(Outcome.CORRECT, found.text, found.method)
    return verdict


def _judged(found: str, method: str, expected: _Reference, timeout: float) -> Verdict:
    refused = _refused(found)
    if refused:
        return Verdict(Outcome.WRONG, found[:MAX_ANSWER_CHARS], method, f"the answer is {refused}")
    answer = clean(found)
    if not re.search(r"[^\W_]|\\", answer):
        return Verdict(Outcome.NO_ANSWER)
    equal = _plain_verdict(answer, expected)
    if equal is not None:
        return Verdict(Outcome.CORRECT if equal else Outcome.WRONG, found, method)
    try:
        outcome = workers.ask({"answer": answer, "reference": expected.text}, timeout)["outcome"]
    except Unscorable as error:
        return Verdict(Outcome.UNSCORABLE, found, method, str(error))
    if outcome == "unreadable reference":
        reason = f"the reference {expected.text!r} cannot be read as mathematics"
        return Verdict(Outcome.UNSCORABLE, found, method, reason)
    if outcome not in ("equal", "different"):
        return Verdict(Outcome.UNSCORABLE, found, method, f"the math verifier failed: {outcome}")
    return Verdict(Outcome.CORRECT if outcome == "equal" else Outcome.WRONG, found, method)


_extract = extract  # the name that `verify` gives to its parameter


# ---- the reference ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    text: str
    refused: str
    quantity: Quantity | None
    choice: str | None
    words: str | None
    clock: Clock | None
    compound: Compound | None


def _reference(reference: Any) -> _Reference:
    """Raises ValueError for what cannot be a reference."""
    text: str | None = None
    if isinstance(reference, str):
        text = reference
    elif isinstance(reference, Integral) and not isinstance(reference, bool):
        text = _digits(int(reference))
    elif isinstance(reference, float) and math.isfinite(reference):
        text = format(Decimal(repr(float(reference))), "f")  # the decimal that was written, not its binary neighbour
    elif isinstance(reference, Decimal) and reference.is_finite():
        text = format(reference, "f") if abs(reference.adjusted()) < MAX_ANSWER_CHARS else str(reference)
    elif isinstance(reference, Fraction):
        text = f"{_digits(reference.numerator)}/{_digits(reference.denominator)}"
    if text is None or not text.strip():
        shown = repr(reference) if len(repr(reference)) <= 200 else f"{repr(reference)[:200]}..."
        raise ValueError(f"the math reward needs a number or a text with the answer as reference, got {shown}")
    return _read_reference(text)


def check_reference(reference: Any) -> None:
    """Raises ValueError for what cannot be a reference. Whether it can be read as a formula is not looked at."""
    _reference(reference)


def _digits(number: int) -> str:
    """Python refuses to print integers beyond some thousand digits; such a reference is refused anyway."""
    return str(number) if number.bit_length() < 4 * MAX_ANSWER_CHARS else "1" * (MAX_ANSWER_CHARS + 1)


@functools.lru_cache(maxsize=4096)
def _read_reference(reference: str) -> _Reference:
    if "####" in reference:
        answer = reference.rpartition("####")[2]
    else:
        held = boxed(reference)
        answer = reference if held is None else held
    refused = _refused(answer)
    if refused:
        return _Reference("", refused, None, None, None, None, None)
    text = clean(told(answer))
    if not text:
        raise ValueError(f"the math reward needs a reference with an answer in it, got {reference[:200]!r}")
    return _Reference(text, "", quantity(text), choice(text), words(text), clock(text), compound(text))


def _refused(text: str) -> str:
    """Why a text is beyond the caps, or ""."""
    if len(text) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return f"nested deeper than {MAX_NESTING} brackets" if deepest > MAX_NESTING else ""


# ---- verdicts without a worker ----------------------------------------------------------------------------------


_MIXED = re.compile(r"(-?[0-9]+)\s*\\text\s*\{\s*and\s*\}\s*(\\frac\{[0-9]+\}\{[0-9]+\}|[0-9]+\s*/\s*[0-9]+)")


def _mixed_number(text: str) -> Quantity | None:
    r"""The number that 3 \text{ and } \frac{3}{4} can be; it can be a list, too."""
    mixed = _MIXED.fullmatch(text)
    return quantity(f"{mixed[1]} {mixed[2]}") if mixed else None


def _plain_verdict(answer: str, expected: _Reference) -> bool | None:
    """Equal or not where that needs no formula to be read; None for the rest."""
    if expected.clock is not None and expected.clock.half and (time := clock(answer)):
        return time.equals(expected.clock)
    number = quantity(answer)
    if number is None and expected.quantity is not None:
        number = _mixed_number(answer)
    if expected.quantity is None and (mixed := _mixed_number(expected.text)) and mixed == number:
        return True
    if number is not None and expected.quantity is not None:
        return number.equals(expected.quantity)
    if canonical(answer) == canonical(expected.text):
        return True
    if nothing(answer) and nothing(expected.text):
        return True
    if (numeral := roman(expected.text)) and roman(answer):
        return roman(answer) == numeral
    if expected.compound is not None:
        parts = compound(answer)
        return parts is not None and same_compound(parts, expected.compound)
    time, expected_time = clock(answer), expected.clock
    is_time = any(read is not None and read.certain for read in (time, expected_time))
    if is_time and time is not None and expected_time is not None:
        return time.equals(expected_time)
    terms, others = ratio(answer), ratio(expected.text)
    if terms is not None and others is not None and ":" in expected.text and not is_time:
        return same_ratio(terms, others)
    if expected.choice is not None:
        return chosen(answer) == expected.choice.upper()
    if expected.words is not None:
        return (words(answer) or words(canonical(answer))) == expected.words
    if words(answer) is not None or not answer.isascii():
        return False  # a name for a formula; or digits or letters that no rule reads
    if base_numeral(answer) is not None or base_numeral(expected.text) is not None:
        return base_numeral(answer) == base_numeral(expected.text)
    return None
