r"""Is an answer the reference? Takes both apart (lists, tuples, intervals, sets, matrices, equations, text), compares
the pieces as values, and asks Math-Verify about what is left (sums, integrals, inequalities in several variables).

Runs inside the worker processes only: it imports mpmath, sympy and the LaTeX parser. Both texts are already cleaned
(`dress.clean`) and within the caps of length and nesting.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rl_lora.rewards.math.clocks import clock
from rl_lora.rewards.math.compounds import compound, same_compound
from rl_lora.rewards.math.formula import TooLarge, Undefined, Unreadable
from rl_lora.rewards.math.lines import side_by_side
from rl_lora.rewards.math.lists import (
    MAX_ITEMS,
    WORDED,
    as_list,
    by_name,
    distinct,
    is_bare_list,
    items_of,
    rows_of,
    spread_signs,
    top_level,
    with_condition,
)
from rl_lora.rewards.math.numbers import quantity
from rl_lora.rewards.math.reader import read
from rl_lora.rewards.math.relations import (
    BIG,
    EQUALS,
    LESS,
    MORE,
    NAME,
    SIGNS,
    UNEQUAL,
    as_interval,
    assigned,
    is_equation,
    is_inequality,
    proportional,
    united,
)
from rl_lora.rewards.math.sets import same_set
from rl_lora.rewards.math.symbolic import (
    UnreadableReference,
    rounds_to,
    same_by_math_verify,
    same_scalar,
    same_terms,
    without_unit,
)
from rl_lora.rewards.math.text import base_numeral, canonical, roman
from rl_lora.rewards.math.unit_names import units_conflict
from rl_lora.rewards.math.units import split_unit

EQUAL, DIFFERENT, UNREADABLE = "equal", "different", "unreadable reference"
_SUM_OF_MONEY = re.compile(r"[$€£₹¥]\s?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")  # $26,000 is no list


def compare(answer: str, reference: str) -> str:
    """EQUAL, DIFFERENT or UNREADABLE. An answer that cannot be read is DIFFERENT from a reference that can."""
    answer, reference = (_SUM_OF_MONEY.sub(lambda sum_: sum_[0].replace(",", ""), text) for text in (answer, reference))
    if min(answer.count("="), reference.count("=")) > 1:
        several, others = (text if is_bare_list(text) else side_by_side(text) for text in (answer, reference))
        if is_bare_list(several) and is_bare_list(others):
            answer, reference = several, others
    try:
        return EQUAL if _same(answer, reference) else DIFFERENT
    except UnreadableReference:
        return DIFFERENT if _is_readable(reference) else UNREADABLE
    except (RecursionError, TooLarge, Undefined):
        return DIFFERENT


def _is_readable(reference: str) -> bool:
    """Whether a reference can be compared with a plain number: no answer makes a good reference look unreadable."""
    try:
        _same("1", reference)
    except UnreadableReference:
        return False
    except (RecursionError, TooLarge, Undefined):
        pass
    return True


def _same(answer: str, reference: str) -> bool:
    answer, reference = as_list(answer), as_list(reference)
    if canonical(answer) == canonical(reference):
        return True
    if {canonical(answer), canonical(reference)} & {r"\emptyset", r"\{\emptyset\}"}:
        return False
    number, expected = quantity(answer), quantity(reference)
    if number is not None and expected is not None:
        return number.equals(expected)
    time, expected_time = clock(answer), clock(reference)
    certain = any(read is not None and read.certain for read in (time, expected_time))
    if time is not None and expected_time is not None and certain:
        return time.equals(expected_time)
    if (in_radians := _angles(answer, reference)) is not None:
        return same_scalar(*in_radians)
    if (base_numeral(answer) or base_numeral(reference)) is not None:
        return base_numeral(answer) == base_numeral(reference)
    for compare_parts in _BY_PARTS:
        verdict = compare_parts(answer, reference)
        if verdict is not None:
            return verdict
    if certain:
        return False  # a time is no number
    if (parts := compound(reference)) is not None:
        others = compound(answer)
        return others is not None and same_compound(others, parts)
    (answer, unit), (reference, expected_unit) = without_unit(answer), without_unit(reference)
    if units_conflict(unit, expected_unit):
        return False
    return same_scalar(answer, reference)


def _angles(answer: str, reference: str) -> tuple[str, str] | None:
    """An angle in degrees beside one in multiples of \\pi, both in radians; None for anything else."""
    sides = [split_unit(text) for text in (answer, reference)]
    degrees = [unit == "degree" for _, unit in sides]
    if sorted(degrees) != [False, True] or r"\pi" not in sides[degrees.index(False)][0]:
        return None
    radians = [rf"\frac{{({stem})\pi}}{{180}}" if unit == "degree" else stem for stem, unit in sides]
    return radians[0], radians[1]


def _conditions(answer: str, reference: str) -> bool | None:
    r"""7t for 0 < t < 4, or k \text{ odd}: a value under a condition is equal to none under another."""
    if not WORDED.search(answer) and not WORDED.search(reference):
        return None
    a, b = with_condition(answer), with_condition(reference)
    if a is None and b is None:
        return None
    return a is not None and b is not None and all(_same_side(x, y) for x, y in zip(a, b, strict=True))


_BETWEEN = re.compile(
    r"([^a-z]*[0-9)}])\s+(by|of|per|in|at|on|to|out of|for|and then|remainder|rem|[rR])\.?\s+([0-9(\\-].*)"
)
_TEXT_BETWEEN = re.compile(
    r"([^{}]+?)\\(?:text|mbox|textrm)\s*\{((?![^{}]*\b(?:and|or|mod)\b)[^{}]*[a-z]{2}[^{}]*)\}\s*([^\s^_{}][^{}]*)"
)


def _words_between(answer: str, reference: str) -> bool | None:
    r"""3 by 4, p \text{ divides } q: the same words between the same values."""
    a, b = (_BETWEEN.fullmatch(text) or _TEXT_BETWEEN.fullmatch(text) for text in (answer, reference))
    if a is None or b is None:
        return None
    return a[2].split() == b[2].split() and _same_side(a[1], b[1]) and _same_side(a[3], b[3])


def _same_side(answer: str, reference: str) -> bool:
    """As `_same`; what cannot be read is equal to itself only."""
    try:
        return _same(answer, reference)
    except UnreadableReference:
        return False


_CONGRUENCE = re.compile(
    r"(?:[a-zA-Z]\s*\\equiv(?![a-z]))?\s*(-?[0-9]{1,30})"
    r"\s*(?:\\pmod|\(?\s*\\[bp]?mod|\(?\s*\\text\s*\{\s*mod\s*\})(?![a-z])\s*\{?\s*([1-9][0-9]{0,29})\s*\}?\s*\)?"
)


def _congruences(answer: str, reference: str) -> bool | None:
    r"""x \equiv 3 \pmod{7} and x \equiv 10 \pmod{7} are one; a modulus on one side only says nothing more."""
    a, b = _CONGRUENCE.fullmatch(answer), _CONGRUENCE.fullmatch(reference)
    if a and b:
        return a[2] == b[2] and (int(a[1]) - int(b[1])) % int(a[2]) == 0
    if (a or b) and not (a and b) and not re.search(r"\\equiv|pmod|\(", answer if a else reference):  # 19 \bmod 5 is 4
        left, right = (str(int(x[1]) % int(x[2])) if x else text for x, text in ((a, answer), (b, reference)))
        return _same(left, right)
    if a or b:
        return _same(a[1] if a else answer, b[1] if b else reference)
    return None


def _plus_minus(answer: str, reference: str) -> bool | None:
    r"""1 \pm \sqrt{2} is the list of both."""
    if not any(sign in text for sign in (r"\pm", r"\mp") for text in (answer, reference)):
        return None
    if canonical(answer) == canonical(reference):
        return True
    spread = [spread_signs(text) for text in (answer, reference)]
    if any(r"\pm" in text or r"\mp" in text or text.count(",") > MAX_ITEMS for text in spread):
        return None
    return _same(*spread)


def _assignments(answer: str, reference: str) -> bool | None:
    r"""x = 5 against 5, x \in S against S, and x = 5 against x = 5. The name matters only if both have one."""
    (name, value), (expected_name, expected) = assigned(answer), assigned(reference)
    if name is None and expected_name is None:
        return None
    if name is not None and expected_name is not None:
        if canonical(name) == canonical(expected_name):
            return _same(value, expected)
        if not (NAME.fullmatch(name) and NAME.fullmatch(expected_name)) and canonical(value) != canonical(
            expected_name
        ):
            return _same_equation((name, value), (expected_name, expected))
        return None  # y = 2x and x = y/2 are one equation
    if name is not None and is_equation(reference):
        return None
    if expected_name is not None and is_equation(answer):
        return None
    return _same(value, expected)


def _relations(answer: str, reference: str) -> bool | None:
    a, b = top_level(answer, EQUALS), top_level(reference, EQUALS)
    if min(len(a), len(b)) > 1 and not is_bare_list(answer) and not is_bare_list(reference):
        if len(a) == len(b) > 2:
            return all(map(_same_side, a, b))
        return _same_equation((a[0], a[-1]), (b[0], b[-1]))  # a chain says what its ends say
    if len(a) == 1 and len(b) > 1 and not is_inequality(answer) and not is_bare_list(reference):
        return False  # an equation says more than a value does
    if len(a) > 1 and len(b) == 1 and not is_bare_list(answer) and not is_inequality(reference):
        return _same(a[-1], reference)  # 12 + 6 = 18
    interval, expected = as_interval(answer), as_interval(reference)
    both = is_inequality(answer) and is_inequality(reference)
    if (interval != answer and expected != reference) or ((interval, expected) != (answer, reference) and not both):
        return _same(interval, expected)
    if BIG.search(answer) or BIG.search(reference):
        return _same_relation(answer, reference)
    if is_inequality(answer) or is_inequality(reference):
        return bool(same_by_math_verify(answer, reference))
    return None


def _same_relation(answer: str, reference: str) -> bool | None:
    r"""\lim a_n \le 5 beside 5 \ge \lim a_n: the same sign between the same sides; None without a sign in either."""
    signs = []
    for text in (answer, reference):
        sides = top_level(text, rf"{LESS}|{MORE}|{UNEQUAL}")
        found = re.findall(rf"{LESS}|{MORE}|{UNEQUAL}", text)
        more = len(sides) == 2 and len(found) == 1 and re.fullmatch(MORE, found[0]) is not None
        signs.append((sides[::-1] if more else sides, [SIGNS.get(sign, sign) for sign in found]))
    (sides, sign), (others, expected) = signs
    if len(sides) == len(others) == 1:
        return None
    same = sign == expected and len(sides) == len(others)
    return same and all(_same_side(a, b) for a, b in zip(sides, others, strict=True))


def _same_equation(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two equations say the same: their differences are multiples of each other."""
    try:
        difference = ("sum", read(a[0]), ("negative", read(a[1])))
        expected = ("sum", read(b[0]), ("negative", read(b[1])))
    except Unreadable:  # sums, limits: Math-Verify would look at one side only
        return any(all(map(_same_side, a, sides)) for sides in (b, b[::-1]))
    return proportional(difference, expected)


def _unions(answer: str, reference: str) -> bool | None:
    a, b = (united(text) for text in (answer, reference))
    return _same_unordered(a, b) if max(len(a), len(b)) > 1 else None


def _matrices(answer: str, reference: str) -> bool | None:
    a, b = rows_of(answer), rows_of(reference)
    if a is None and b is None:
        return None
    if a is None or b is None:
        return None if r"\begin" in answer and r"\begin" in reference else False
    if [len(row) for row in a] != [len(row) for row in b]:
        return False
    if sum(len(row) for row in a) > MAX_ITEMS:
        return False
    return all(_same(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


def _collections(answer: str, reference: str) -> bool | None:
    """Lists: in braces or bare, in any order; in (...), [...), \\langle...\\rangle in their order and with their
    brackets. A bare list and one in parentheses are equal in the same order; a list of one is its item."""
    (kind, items), (expected_kind, expected) = items_of(answer), items_of(reference)
    items = distinct(items) if kind == r"\{" else items
    expected = distinct(expected) if expected_kind == r"\{" else expected
    if expected_kind == "()" and kind == "":
        items = by_name(items)
    elif kind == "()" and expected_kind == "":
        expected = by_name(expected)
    if len(items) == 1 == len(expected):
        if kind == expected_kind == "":
            return None
        return _same(items[0], expected[0])
    if len(items) != len(expected) or len(items) > MAX_ITEMS:
        return False
    ordered = {kind, expected_kind} & {"()", "[]", "(]", "[)", r"\langle"}
    if not ordered:
        return _same_unordered(items, expected)
    if kind != expected_kind and {kind, expected_kind} not in ({"()", ""}, {"[]", ""}, {"()", r"\langle"}):
        return False
    return all(_same_item(a, b) for a, b in zip(items, expected, strict=True))


def _same_item(answer: str, reference: str) -> bool:
    numeral = roman(reference)
    return roman(answer) == numeral if numeral and roman(answer) else _same(answer, reference)


def _same_unordered(items: list[str], expected: list[str]) -> bool:
    if len(items) != len(expected) or len(items) > MAX_ITEMS:
        return False
    left = list(items)
    for wanted in expected:
        match = next((item for item in left if _same_item(item, wanted)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _sets(answer: str, reference: str) -> bool | None:
    return same_set(answer, reference, top_level, as_interval) or None


def _approximations(answer: str, reference: str) -> bool | None:
    r"""\sqrt{30} \approx 5.48 is either side of it, if the decimal is the value rounded."""
    sides = [top_level(text, r"\\(?:approx|simeq)(?![a-zA-Z])") for text in (answer, reference)]
    if max(map(len, sides)) != 2 or not all(all(side) for side in sides):
        return None
    for side in sides:
        if len(side) == 2 and not rounds_to(top_level(side[0], EQUALS)[-1], side[1]):
            return False
    return any(_same(a, b) for a in sides[0] for b in sides[1])


_BY_PARTS: tuple[Callable[[str, str], bool | None], ...] = (
    _sets,
    _conditions,
    _words_between,
    _congruences,
    _approximations,
    same_terms,
    _plus_minus,
    _assignments,
    _unions,
    _relations,
    _matrices,
    _collections,
)
