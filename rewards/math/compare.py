r"""Is an answer the reference? Takes both apart (lists, tuples, intervals, sets, matrices, equations, text), compares
the pieces as values, and asks Math-Verify about what is left (sums, integrals, inequalities in several variables).

Runs inside the worker processes only: it imports mpmath, sympy and the LaTeX parser. Both texts are already cleaned
(`math_dress.clean`) and within the caps of length and nesting.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

from rl_lora.rewards.math.clocks import clock
from rl_lora.rewards.math.compounds import compound, same_compound
from rl_lora.rewards.math.dress import clean
from rl_lora.rewards.math.formula import TooLarge, Tree, Undefined, Unreadable, variables
from rl_lora.rewards.math.lines import side_by_side
from rl_lora.rewards.math.names import is_name
from rl_lora.rewards.math.numbers import quantity
from rl_lora.rewards.math.reader import read
from rl_lora.rewards.math.sets import same_set
from rl_lora.rewards.math.text import base_numeral, canonical, roman
from rl_lora.rewards.math.unit_names import units_conflict
from rl_lora.rewards.math.units import split_unit
from rl_lora.rewards.math.values import evaluate, same_value

EQUAL, DIFFERENT, UNREADABLE = "equal", "different", "unreadable reference"
MAX_ITEMS = 64
"""Lists and matrices with more entries than this are not taken apart."""


class UnreadableReference(Exception):
    """Neither this module nor Math-Verify can read the reference."""


_SUM_OF_MONEY = re.compile(r"[$€£₹¥]\s?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")  # $26,000 is no list


def compare(answer: str, reference: str) -> str:
    """EQUAL, DIFFERENT or UNREADABLE. An answer that cannot be read is DIFFERENT from a reference that can."""
    answer, reference = (_SUM_OF_MONEY.sub(lambda sum_: sum_[0].replace(",", ""), text) for text in (answer, reference))
    if min(answer.count("="), reference.count("=")) > 1:
        several, others = (text if _is_bare_list(text) else side_by_side(text) for text in (answer, reference))
        if _is_bare_list(several) and _is_bare_list(others):
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


def warm_up() -> None:
    """Import and build once what the first item would otherwise pay for."""
    logging.disable(logging.CRITICAL)
    _evaluate_no_text()
    if not _ask_math_verify(r"\int_0^1 x dx", r"\frac{1}{2}", True):
        raise RuntimeError("Math-Verify does not work here: it cannot integrate x from 0 to 1")


def _evaluate_no_text() -> None:
    """Replace sympy's reader of Python expressions, which ends in `eval`, by a reader of numerals.

    sympy hands it any text that stands where a number should. Math-Verify's LaTeX grammar uses it for numerals only
    (which now also stay exact: 0.1 is 1/10); whatever else might find a way there is refused.
    """
    import math_verify.parser
    import sympy
    from latex2sympy2_extended import latex2sympy2
    from sympy.parsing import sympy_parser

    def numeral(text: object, *_: object, **__: object) -> Any:
        if (
            not isinstance(text, str)
            or len(text) > 1000
            or not re.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", text)
        ):
            raise sympy.SympifyError(text)
        return sympy.Rational(Fraction(text))

    for module in (sympy_parser, sympy.parsing, latex2sympy2, math_verify.parser):
        module.parse_expr = numeral


# ---- taking apart -----------------------------------------------------------------------------------------------


def _same(answer: str, reference: str) -> bool:
    answer, reference = _system(answer), _system(reference)
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
        return _same_scalar(*in_radians)
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
    (answer, unit), (reference, expected_unit) = _without_unit(answer), _without_unit(reference)
    if units_conflict(unit, expected_unit):
        return False
    return _same_scalar(answer, reference)


def _angles(answer: str, reference: str) -> tuple[str, str] | None:
    """An angle in degrees beside one in multiples of \\pi, both in radians; None for anything else."""
    sides = [split_unit(text) for text in (answer, reference)]
    degrees = [unit == "degree" for _, unit in sides]
    if sorted(degrees) != [False, True] or r"\pi" not in sides[degrees.index(False)][0]:
        return None
    radians = [rf"\frac{{({stem})\pi}}{{180}}" if unit == "degree" else stem for stem, unit in sides]
    return radians[0], radians[1]


_SYSTEM = re.compile(r"\\begin\{(cases|aligned|align\*?|gathered)\}(.*)\\end\{\1\}", re.DOTALL)


def _system(text: str) -> str:
    """A system of equations as a list; the real numbers as an interval."""
    if match := _SYSTEM.fullmatch(text):
        return ", ".join(row.strip(" ,") for row in match[2].replace("&", "").split(r"\\") if row.strip(" ,"))
    return r"(-\infty,\infty)" if canonical(text) in (r"\mathbb{R}", r"\mathbbR", r"\R", r"\Reals") else text


def _without_unit(text: str) -> tuple[str, str | None]:
    stem, unit = split_unit(text)
    if unit is None:
        stem = re.sub(r"^(?:\\\$|[$€£])\s*", "", text)
        return stem, "$" if stem != text else None
    return stem, unit


_CONDITION_WORD = r"(?:for|if|when(?:ever)?|where|provided(?:\s+that)?|with)"
_CONDITION = (
    rf"\\(?:text|mbox|textrm|mathrm)\s*\{{[\s,]*{_CONDITION_WORD}(?:\s+(?:all|any|every|some))?\s*\}}"
    rf"|(?<![a-zA-Z\\{{]){_CONDITION_WORD}(?:\s+(?:all|any|every|some))?(?![a-zA-Z])"
)
_WORDED = re.compile(r"\\(?:text|mbox|mathrm)|(?<![a-zA-Z\\])[a-z]{2}")
_REMARK = re.compile(r"(.*\S)\s*\\(?:text|mbox|textrm|textit)\s*\{([^{}]*[a-zA-Z]{2}[^{}]*)\}", re.DOTALL)
_KIND_NAMES = """
    odd even prime composite rational irrational real complex imaginary integer integers whole natural positive negative
    nonnegative nonzero divisible multiple constant finite infinite convergent divergent
"""
_KINDS = frozenset(_KIND_NAMES.split())
_PLAIN_REMARK = re.compile(rf"(.*\S)\s+((?:is|are)\s+[a-z -]+|(?:not\s+)?(?:{'|'.join(_KINDS)})(?:\s[a-z ]+)?)")


def _conditions(answer: str, reference: str) -> bool | None:
    r"""7t for 0 < t < 4, or k \text{ odd}: a value under a condition is equal to none under another."""
    if not _WORDED.search(answer) and not _WORDED.search(reference):
        return None
    a, b = _with_condition(answer), _with_condition(reference)
    if a is None and b is None:
        return None
    return a is not None and b is not None and all(_same_side(x, y) for x, y in zip(a, b, strict=True))


def _with_condition(text: str) -> tuple[str, str] | None:
    parts = _top_level(text, _CONDITION)
    if len(parts) == 2 and all(parts) and not any(_is_bare_list(part.strip(" ,;")) for part in parts):
        return parts[0].rstrip(" ,;"), parts[1]
    match = _REMARK.fullmatch(text) or _PLAIN_REMARK.fullmatch(text)
    if match is None or _is_bare_list(text):
        return None
    words = match[2].strip(" ,.()").lower()
    if not words.startswith(("is ", "are ")) and not (
        re.search("[a-zA-Z]", match[1]) and (_KINDS & set(words.split()) or split_unit(text)[1] is None)
    ):
        return None
    return match[1], re.sub(r"^(?:is|are)\s+", "", words)


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


def _top_level(text: str, separator: str) -> list[str]:
    """The text split where the regular expression `separator` matches outside of brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        rf"\\begin\{{|\\end\{{|(?P<cut>{separator})|\\[{{]|\\[}}]|[(\[{{]|[)\]}}]|\\[a-zA-Z]+", text
    ):
        token = match[0]
        if match["cut"] is not None and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif token == r"\begin{":
            depth += 2
        elif token == r"\end{":
            depth += 0
    return [part.strip() for part in [*parts, text[start:]]]


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
    spread = [_spread(text) for text in (answer, reference)]
    if any(r"\pm" in text or r"\mp" in text or text.count(",") > MAX_ITEMS for text in spread):
        return None
    return _same(*spread)


def _spread(text: str) -> str:
    inner, braces = _braced(text)
    items = []
    for item in _top_level(inner, ","):
        if re.search(r"\\[pm]m(?![a-zA-Z])", item):
            left, equals, right = item.rpartition("=")
            for plus, minus in (("+", "-"), ("-", "+")):
                signs = re.sub(r"\\mp(?![a-zA-Z])", minus, re.sub(r"\\pm(?![a-zA-Z])", plus, right))
                items.append(left + equals + signs)
        else:
            items.append(item)
    joined = ", ".join(items)
    return rf"\{{{joined}\}}" if braces else joined


def _braced(text: str) -> tuple[str, bool]:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return text[2:-2].strip(), True
    return text, False


# ---- equations and inequalities ---------------------------------------------------------------------------------

_EQUALS = r"(?<![<>!:\\])=(?!=)"
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\s*\([a-zA-Z, ]+\))?|[A-Za-z]{1,2}")
_NAMES = re.compile(r"\(\s*[a-zA-Z]\s*(?:,\s*\\?[a-zA-Z]+\s*)+\)")
_LESS = r"\\leq?(?:slant)?(?![a-zA-Z])|<=|<|\\lt(?![a-zA-Z])"
_MORE = r"\\geq?(?:slant)?(?![a-zA-Z])|>=|>|\\gt(?![a-zA-Z])"


def _assignments(answer: str, reference: str) -> bool | None:
    r"""x = 5 against 5, x \in S against S, and x = 5 against x = 5. The name matters only if both have one."""
    (name, value), (expected_name, expected) = _assigned(answer), _assigned(reference)
    if name is None and expected_name is None:
        return None
    if name is not None and expected_name is not None:
        if canonical(name) == canonical(expected_name):
            return _same(value, expected)
        if not (_NAME.fullmatch(name) and _NAME.fullmatch(expected_name)) and canonical(value) != canonical(
            expected_name
        ):
            return _same_equation((name, value), (expected_name, expected))
        return None  # y = 2x and x = y/2 are one equation
    if name is not None and _is_equation(reference):
        return None
    if expected_name is not None and _is_equation(answer):
        return None
    return _same(value, expected)


def _assigned(text: str) -> tuple[str | None, str]:
    if _is_bare_list(text):
        return None, text
    member = re.fullmatch(r"(.*?)\\in(?![a-zA-Z])(.*)", text, re.DOTALL)
    if member and _NAME.fullmatch(member[1].strip()):
        return member[1].strip(), member[2].strip()
    sides = _top_level(text, _EQUALS)
    if len(sides) > 1 and all(sides) and (is_name(sides[0]) or _NAMES.fullmatch(sides[0])):
        if _NAMES.fullmatch(sides[0]):
            return _in_order(sides[0], sides[-1])
        return sides[0], sides[-1]
    return None, text


def _in_order(names: str, values: str) -> tuple[str, str]:
    """(y, x) = (3, 7) as (x, y) = (7, 3)."""
    order, (kind, items) = [name.strip() for name in names[1:-1].split(",")], _items(values)
    if kind != "()" or len(items) != len(order) or not all(re.fullmatch("[a-zA-Z]", name) for name in order):
        return names, values
    pairs = sorted(zip(order, items, strict=True))
    return f"({', '.join(name for name, _ in pairs)})", f"({', '.join(item for _, item in pairs)})"


def _is_equation(text: str) -> bool:
    return len(_top_level(text, _EQUALS)) > 1 and not _is_bare_list(text)


def _relations(answer: str, reference: str) -> bool | None:
    a, b = _top_level(answer, _EQUALS), _top_level(reference, _EQUALS)
    if min(len(a), len(b)) > 1 and not _is_bare_list(answer) and not _is_bare_list(reference):
        if len(a) == len(b) > 2:
            return all(map(_same_side, a, b))
        return _same_equation((a[0], a[-1]), (b[0], b[-1]))  # a chain says what its ends say
    if len(a) == 1 and len(b) > 1 and not _inequality(answer) and not _is_bare_list(reference):
        return False  # an equation says more than a value does
    if len(a) > 1 and len(b) == 1 and not _is_bare_list(answer) and not _inequality(reference):
        return _same(a[-1], reference)  # 12 + 6 = 18
    interval, expected = _as_interval(answer), _as_interval(reference)
    both = _inequality(answer) and _inequality(reference)
    if (interval != answer and expected != reference) or ((interval, expected) != (answer, reference) and not both):
        return _same(interval, expected)
    if _BIG.search(answer) or _BIG.search(reference):
        return _same_relation(answer, reference)
    if _inequality(answer) or _inequality(reference):
        return bool(_math_verify(answer, reference))
    return None


_BIG = re.compile(r"\\(?:sum|prod|i+nt|oint|lim(?:sup|inf)?|det|begin)(?![a-zA-Z])")
"""Operators beside whose value Math-Verify does not look at the other side of a relation."""
_UNEQUAL = r"\\(?:neq?|approx|equiv|sim|cong|propto|simeq)(?![a-zA-Z])"


def _same_relation(answer: str, reference: str) -> bool | None:
    r"""\lim a_n \le 5 beside 5 \ge \lim a_n: the same sign between the same sides; None without a sign in either."""
    signs = []
    for text in (answer, reference):
        sides = _top_level(text, rf"{_LESS}|{_MORE}|{_UNEQUAL}")
        found = re.findall(rf"{_LESS}|{_MORE}|{_UNEQUAL}", text)
        more = len(sides) == 2 and len(found) == 1 and re.fullmatch(_MORE, found[0]) is not None
        signs.append((sides[::-1] if more else sides, [_SIGNS.get(sign, sign) for sign in found]))
    (sides, sign), (others, expected) = signs
    if len(sides) == len(others) == 1:
        return None
    same = sign == expected and len(sides) == len(others)
    return same and all(_same_side(a, b) for a, b in zip(sides, others, strict=True))


_SIGNS = dict.fromkeys(("<", ">", r"\lt", r"\gt"), "<") | {r"\ne": r"\neq"}
_SIGNS |= dict.fromkeys((r"\le", r"\leq", r"\leqslant", "<=", r"\ge", r"\geq", r"\geqslant", ">="), "<=")


def _same_equation(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two equations say the same: their differences are multiples of each other."""
    try:
        difference = ("sum", read(a[0]), ("negative", read(a[1])))
        expected = ("sum", read(b[0]), ("negative", read(b[1])))
    except Unreadable:  # sums, limits: Math-Verify would look at one side only
        return any(all(map(_same_side, a, sides)) for sides in (b, b[::-1]))
    return _proportional(difference, expected)


def _proportional(a: Tree, b: Tree) -> bool:
    """Whether a = c b for a constant c that is not 0."""
    renamed = {name: f"{name}*" for name in _variables(b)}
    if _variables(a) != _variables(b) or not renamed:
        return False
    cross = same_value(("product", a, _rename(b, renamed)), ("product", _rename(a, renamed), b))
    zero = ("number", 0)
    return cross and same_value(a, zero) == same_value(b, zero)


def _variables(tree: Tree) -> frozenset[str]:
    return variables(tree)


def _rename(tree: Tree, names: dict[str, str]) -> Tree:
    if tree[0] == "variable":
        return ("variable", names[tree[1]])
    return tuple(_rename(part, names) if isinstance(part, tuple) else part for part in tree)


def _inequality(text: str) -> bool:
    return len(_top_level(text, rf"{_LESS}|{_MORE}")) > 1


_BUILDER = re.compile(r"\\\{\s*(\\?[a-zA-Z]+)(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\||\\vert)\s*(.*\1.*)\\\}")


def _as_interval(text: str) -> str:
    r"""An inequality for one name, also in \{x : x > 2\}, as an interval; any other text as it is."""
    if match := _BUILDER.fullmatch(text):
        text = match[2].strip()
    relation = rf"({_LESS}|{_MORE})"
    if match := re.fullmatch(rf"(.+?){relation}(.+?){relation}(.+)", text):
        low, first, name, second, high = (part.strip() for part in match.groups())
        if not _NAME.fullmatch(name) or bool(re.fullmatch(_LESS, first)) != bool(re.fullmatch(_LESS, second)):
            return text
        if re.fullmatch(_MORE, first):
            low, first, second, high = high, second, first, low
        return f"{'(' if _is_strict(first) else '['}{low},{high}{')' if _is_strict(second) else ']'}"
    if match := re.fullmatch(rf"(.+?){relation}(.+)", text):
        left, sign, right = (part.strip() for part in match.groups())
        less = re.fullmatch(_LESS, sign) is not None
        if _NAME.fullmatch(right) and not _NAME.fullmatch(left):
            left, right, less = right, left, not less
        if not _NAME.fullmatch(left) or "," in right:
            return text
        if less:
            return rf"(-\infty,{right}{')' if _is_strict(sign) else ']'}"
        return rf"{'(' if _is_strict(sign) else '['}{right},\infty)"
    return text


def _is_strict(sign: str) -> bool:
    return sign in ("<", ">", r"\lt", r"\gt")


# ---- collections ------------------------------------------------------------------------------------------------


def _unions(answer: str, reference: str) -> bool | None:
    a, b = (_united(text) for text in (answer, reference))
    return _same_unordered(a, b) if max(len(a), len(b)) > 1 else None


def _united(text: str) -> list[str]:
    r"""The parts of A \cup B, or of "x < 1 or x > 2"."""
    kind, items = _items(text)
    both = re.search(r"(?<![a-zA-Z\\])and(?![a-zA-Z])", text)
    if kind == "" and len(items) > 1 and not both and all(_inequality(item) for item in items):
        return items
    return _top_level(text, r"\\cup(?![a-zA-Z])")


_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


_FACTOR = re.compile(r"([^=<>]*?[^=<>\s+-])\s*(?:\\cdot|\\times|\*)?\s*(?=\\begin\{([pbBvV]?matrix|array)\})")


def _matrices(answer: str, reference: str) -> bool | None:
    a, b = _rows(answer), _rows(reference)
    if a is None and b is None:
        return None
    if a is None or b is None:
        return None if r"\begin" in answer and r"\begin" in reference else False
    if [len(row) for row in a] != [len(row) for row in b]:
        return False
    if sum(len(row) for row in a) > MAX_ITEMS:
        return False
    return all(_same(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


def _rows(text: str) -> list[list[str]] | None:
    """The entries of a matrix; brackets around a bare one change nothing. A determinant (vmatrix) is none."""
    text = re.sub(r"^[(\[]\s*(?=\\begin)|(?<=\})\s*[)\]]$", "", text)
    factor = _FACTOR.match(text)
    factor = None if factor and r"\begin" in factor[1] else factor
    match = _MATRIX.fullmatch(text[factor.end() :] if factor else text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match[2]) if row.strip()]
    cells = [[clean(cell) for cell in row.replace(r"\hline", "").split("&")] for row in rows]
    return [[f"({factor[1]})({cell})" for cell in row] for row in cells] if factor else cells


def _collections(answer: str, reference: str) -> bool | None:
    """Lists: in braces or bare, in any order; in (...), [...), \\langle...\\rangle in their order and with their
    brackets. A bare list and one in parentheses are equal in the same order; a list of one is its item."""
    (kind, items), (expected_kind, expected) = _items(answer), _items(reference)
    items = _distinct(items) if kind == r"\{" else items
    expected = _distinct(expected) if expected_kind == r"\{" else expected
    if expected_kind == "()" and kind == "":
        items = _by_name(items)
    elif kind == "()" and expected_kind == "":
        expected = _by_name(expected)
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


def _distinct(items: list[str]) -> list[str]:
    """A set without what is in it twice."""
    if len(items) > MAX_ITEMS or len({canonical(item) for item in items}) == len(items) > 8:
        return items
    found: list[str] = []
    for item in items:
        if not any(canonical(item) == canonical(other) for other in found):
            found.append(item)
    return found


def _by_name(items: list[str]) -> list[str]:
    """y = 9, x = 4 in the order of the names, which is that of a tuple."""
    names = [re.match(r"\s*([a-zA-Z](?:_\{?[0-9]+\}?)?)\s*=", item) for item in items]
    found = [match[1] for match in names if match]
    if len(found) < len(items) or len(set(found)) < len(items):
        return items
    return [item for _, item in sorted(zip(found, items, strict=True))]


def _same_item(answer: str, reference: str) -> bool:
    numeral = roman(reference)
    return roman(answer) == numeral if numeral and roman(answer) else _same(answer, reference)


@functools.lru_cache(maxsize=64)  # asked for by every kind of part
def _items(text: str) -> tuple[str, list[str]]:
    inner, braces = _braced(text)
    kind = r"\{" if braces else ""
    if text.startswith("{") and text.endswith("}") and "," in text and text.count("{") == 1:
        inner = text[1:-1]
    if match := re.fullmatch(r"\\langle(?![a-zA-Z])(.*)\\rangle", text, re.DOTALL):
        inner, kind = match[1], r"\langle"
    elif (
        text[:1] in ("(", "[")
        and text[-1:] in (")", "]")
        and len(_top_level(text[1:-1], "[,;]")) > 1
        and _encloses(text)
    ):
        inner, kind = text[1:-1], text[0] + text[-1]
    words = r",?\s*(?:\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*"
    separator = rf"{words}|,|;" if kind in ("", r"\{") else ";" if len(_top_level(inner, ";")) > 1 else ","
    if kind == "" and "," in text and quantity(text) is not None:
        return "", [text]
    items = [clean(item) for item in _top_level(inner, separator)]
    if kind == "" and all(re.fullmatch(r"[0-9]{3}", item) for item in items[1:]) and re.search(r"[0-9],[0-9]", text):
        return "", [text] if len(items) > 1 and re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+", text) else items
    return kind, items


def _is_bare_list(text: str) -> bool:
    kind, items = _items(text)
    return kind == "" and len(items) > 1


def _encloses(text: str) -> bool:
    """Whether the first bracket closes at the very end: (1,2) does, (a+b)(c,d) does not."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return index == len(text) - 1
    return False


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
    return same_set(answer, reference, _top_level, _as_interval) or None


def _approximations(answer: str, reference: str) -> bool | None:
    r"""\sqrt{30} \approx 5.48 is either side of it, if the decimal is the value rounded."""
    sides = [_top_level(text, r"\\(?:approx|simeq)(?![a-zA-Z])") for text in (answer, reference)]
    if max(map(len, sides)) != 2 or not all(all(side) for side in sides):
        return None
    for side in sides:
        if len(side) == 2 and not _rounds_to(_top_level(side[0], _EQUALS)[-1], side[1]):
            return False
    return any(_same(a, b) for a in sides[0] for b in sides[1])


def _rounds_to(exact: str, decimal: str) -> bool:
    """Whether a decimal is what a value rounds to at its last place (or is cut to)."""
    rounded = quantity(decimal)
    tree = _read(_without_unit(exact)[0])
    if rounded is None or tree is None or variables(tree):
        return False
    try:
        value = evaluate(tree, {})
        if isinstance(value, Fraction):
            value = mpmath.mpf(value.numerator) / value.denominator
        difference = value - mpmath.mpf(rounded.value.numerator) / rounded.value.denominator
    except (TooLarge, Undefined):
        return False
    places = len(re.sub(r"[^0-9.].*", "", decimal.lstrip("-")).partition(".")[2])
    last_place = mpmath.mpf(10) ** -places
    cut = -difference if rounded.value < 0 else difference
    return bool(abs(difference) <= last_place / 2 or 0 <= cut < last_place)


_BOUND = re.compile(
    r"(\\(?:sum|prod|i*nt)(?:\s*[_^]\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\w|\\infty))*)(?![a-zA-Z])(.+)", re.DOTALL
)


def _bound(answer: str, reference: str) -> bool | None:
    """Sums of the same terms with their factors in another order."""
    a, b = _BOUND.fullmatch(answer), _BOUND.fullmatch(reference)
    if a is None or b is None or canonical(a[1]) != canonical(b[1]):
        return None
    if _BIG.search(a[2] + b[2]) or any(len(_top_level(body[2].lstrip(" -"), r"[-+=<>]")) > 1 for body in (a, b)):
        return None
    trees = _read(a[2]), _read(b[2])
    try:
        return (trees[0] is not None and trees[1] is not None and same_value(trees[0], trees[1])) or None
    except (TooLarge, Undefined):
        return None


_BY_PARTS: tuple[Callable[[str, str], bool | None], ...] = (
    _sets,
    _conditions,
    _words_between,
    _congruences,
    _approximations,
    _bound,
    _plus_minus,
    _assignments,
    _unions,
    _relations,
    _matrices,
    _collections,
)


# ---- single values ----------------------------------------------------------------------------------------------

_INFINITE = re.compile(r"([+-]?)\s*(?:\\infty|\\infinity|infinity|inf|oo)")


def _same_scalar(answer: str, reference: str) -> bool:
    infinite, expected_infinite = _INFINITE.fullmatch(answer), _INFINITE.fullmatch(reference)
    if infinite or expected_infinite:
        return bool(infinite and expected_infinite and (infinite[1] == "-") == (expected_infinite[1] == "-"))
    try:
        expected = _read(reference)
    except TooLarge as error:
        raise UnreadableReference(reference) from error
    found = _read(answer)
    if expected is None or found is None:
        return _math_verify(answer, reference, reference_read=expected is not None)
    try:
        return same_value(found, expected)
    except (TooLarge, Undefined):
        pass
    try:
        same_value(expected, expected)
    except (TooLarge, Undefined) as error:
        raise UnreadableReference(reference) from error
    return False  # a tower of powers is nobody's other way of writing a value


def _read(text: str) -> Tree | None:
    plain = quantity(text)
    if plain is not None and plain.unit is None:
        return ("number", plain.value)  # also 2e5, which might be a product
    try:
        return read(text)
    except Unreadable:
        return None


_ITS_OWN = re.compile(
    r"<|>|\\(?:sum|prod|int|iint|oint|lim|cap|cup|setminus|mathbb|in|notin|subset|subseteq|le|leq|ge|geq|lt|gt|ne|neq"
    r"|det|begin|bmod|pmod|mod|mid|equiv|partial|prime|overline|approx|log|bar|dots|ldots|cdots)(?![a-zA-Z])"
)
"""What Math-Verify reads and the grammar of values does not; for anything else it is not asked."""
_HEAVY = re.compile(r"[0-9]{6,}|[0-9]{4,}\s*[!}]|\)\s*!|!\s*!|[0-9)}]\s*\^\s*\{?\s*[0-9]{3,}|10\s*\^|\^\s*\{[^{}]*\^")
"""Numerals that make sympy work for minutes; in an answer to a plain reference they are refused beforehand."""
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{4,}")


def _math_verify(answer: str, reference: str, *, reference_read: bool = False) -> bool:
    """Math-Verify's verdict, through its LaTeX grammar only: its reader of plain expressions ends in `eval`.

    Its own time-outs are off (they need the main thread and its signals); the worker's deadline holds. What it calls
    equal because two numbers are close is checked again with 60 digits.
    """
    if not (_ITS_OWN.search(answer) or _ITS_OWN.search(reference)):
        if reference_read:
            return False
        raise UnreadableReference(reference)
    if reference_read and _HEAVY.search(answer):
        return False
    try:
        return _ask_math_verify(answer, reference, reference_read)
    except (MemoryError, UnreadableReference):
        raise
    except Exception:  # sympy raises what it likes, TypeErrors over two equations among them
        return False


def _ask_math_verify(answer: str, reference: str, reference_read: bool) -> bool:
    expected = _parse(reference)
    if not expected and not reference_read:
        raise UnreadableReference(reference)
    found = _parse(answer)
    if not expected or not found:
        return False
    import math_verify

    equal: Callable[..., bool] = math_verify.verify
    if not equal(expected, found, timeout_seconds=None, numeric_precision=60, float_rounding=15):
        return False
    return not _refuted(expected[0], found[0])


def _parse(text: str) -> list[Any]:
    import math_verify

    if _WORD.search(re.sub(r"\\[a-zA-Z]+\{[^{}]*\}|\\[a-zA-Z]+", "", text)):
        return []  # its grammar reads a word as a product of letters, in any order
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    parsed: list[Any] = math_verify.parse(
        f"${text}$",
        [config],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed


def _refuted(a: Any, b: Any) -> bool:
    """Whether two sympy numbers differ in their first 60 digits."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and not value.free_symbols for value in (a, b)):
        return False
    x, y = (sympy.N(value, 80) for value in (a, b))
    if not (x.is_number and y.is_number):
        return False
    scale = max(abs(x), abs(y))
    return bool(abs(x - y) > scale * sympy.Float(10, 80) ** -60)
