"""Formulas and numbers inside prose: the last one of a text, the last side of an equation,
a short text that is all answer."""

from __future__ import annotations

import itertools
import re

from rl_lora.rewards.math.clocks import HALF_DAY, PART_OF_DAY
from rl_lora.rewards.math.hedges import bounded, unsettled
from rl_lora.rewards.math.languages import (
    denied_near,
)
from rl_lora.rewards.math.markers import last_match
from rl_lora.rewards.math.numbers import DECIMAL
from rl_lora.rewards.math.prose import labelled
from rl_lora.rewards.math.text import nothing
from rl_lora.rewards.math.words import NUMBER_WORDS

MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:[^\\]|\\[^\[\]])+)\\\]|\\\(((?:[^\\]|\\[^()])+)\\\)"
    r"|(?<![\\$])\$(?!\$)((?:\\\$|[^$\n])*?[^\\$\n])\$",
    re.DOTALL,
)
_SIGN = "[-+\N{MINUS SIGN}]"
_HALF_BEHIND = re.compile(rf"[\s*$~]{{0,4}}(?:\\(?:text|mathrm)\s*\{{\s*)?{PART_OF_DAY}", re.IGNORECASE)
_DOZEN_BEHIND = re.compile(r"\s*doz(?:ens?)?\b")
_LABELS = "week day month year step hour round case part box group game level stage question problem".split()  # noqa: SIM905
_NO_LABEL = "".join(rf"(?<!(?i:{label}\s))" for label in _LABELS)  # "Week 3:210 pages"
_CLOCK = (
    rf"(?=[0-9]+:[0-9]){_NO_LABEL}(?:[0-9]{{1,2}}:[0-5][0-9](?::[0-5][0-9])?(?![0-9:])(?:(?i:{_HALF_BEHIND.pattern}))?"
    rf"|[0-9]+(?::[0-9]+)+)|[0-9]{{1,2}}(?i:[\s*$~]{{0,4}}(?:\\(?:text|mathrm)\s*\{{\s*)?(?:{HALF_DAY}|noon\b|o'clock\b))"
)
_WRITTEN = rf"(?:0,[0-9]{{3}}(?![0-9])|{DECIMAL})"  # 0,318 is no number, but not half of it either
NUMBER = re.compile(
    rf"(?<![^\W_])(?<![A-Za-z0-9]_)(?<![.,/])(?:{_SIGN}?\s?[\\$£€₹]{{0,3}}{_SIGN}?)?"
    rf"(?:{_CLOCK}|[0-9]+\s+[0-9]+/[0-9]+|[0-9]+\s*\\[dt]?frac\{{[0-9]+\}}\{{[0-9]+\}}"
    rf"|\\[dt]?frac\{{{_SIGN}?[0-9.]+\}}\{{[0-9.]+\}}|{_WRITTEN}(?:[eE]{_SIGN}?[0-9]+)?(?:\s*/\s*{_WRITTEN})?)"
    r"(?:\s?\\?%|\s(?:percent|hundred|thousand|million|billion|trillion)\b)?"
)
_FALSE_NAME = re.compile(r"\b(?:wrong|incorrect|false|invalid|not)(?:\b|_)", re.IGNORECASE)


def half_behind(text: str, time: re.Match[str]) -> str:
    """The half of the day or the dozen that follows a match: "$9:00$ PM", "$3$ dozen"."""
    half = _HALF_BEHIND.match(text, time.end()) or _DOZEN_BEHIND.match(text, time.end())
    return half[0] if half else ""


def formula_over_lines(rest: str) -> str | None:
    """The formula in single dollars that a text begins with, if it goes on over a line break."""
    end = rest.find("$", 1)
    inside = rest[1:end]
    broken = rest[:1] == "$" and 1 < end <= 1000 and "\n" in inside
    broken = broken and ("\\" in inside or re.search(r"[-+*/^=]\s*\n|\n\s*[-+*/^=]", inside) is not None)
    return inside if broken and not re.search(r"\n[ \t]*\n", inside) else None


def as_spoken(line: str) -> str:
    """A line of prose without markdown and with a number of its own for each formula in it that is not plain."""
    numerals = itertools.count(1)

    def numeral(match: re.Match[str]) -> str:
        if not is_formula(match):
            return match[0]
        inside = content_of(match).strip()
        return inside if re.fullmatch(DECIMAL, inside) else f" {next(numerals)} "

    return re.sub(
        r"\*\*|__|\$(?![0-9])|(?<!\w)[_*](?=[a-z]+[_*])|(?<=[a-z])[_*](?!\w)", "", MATH.sub(numeral, line)
    ).strip(" :*")


_THEREFORE = re.compile(r"(?:Thus|So|Hence|Therefore|Then|Finally),?\s+(?=[$\\a-z])")


def whole(text: str) -> str | None:
    """All of a short text without sentences: one line with at most one word that is not part of a formula."""
    text = _THEREFORE.sub("", text.strip())
    if not text or len(text) > 200 or "\n" in text:
        return None
    if nothing(text):
        return text
    if (segment := MATH.fullmatch(text.rstrip(" .,;"))) and is_formula(segment):
        return last_side(content_of(segment).strip())
    if (value := labelled(text)) is not None:
        return last_side(value.strip("* "))
    bare = re.sub(r"\\(?:text|mbox|begin|end)\s*\{[^{}]*\}(?:\{[clr|]*\})?|\\[a-zA-Z]+", " ", text)
    bare = re.sub(r"\b[A-Z]{2,3}\b", " ", bare) if "=" in text else bare  # AB = CD
    words = [word for word in re.findall(r"[^\W\d_]{2,}", bare) if word.lower() not in _FORMULA_WORDS]
    if words and words[0].lower() in NUMBER_WORDS and not re.search(r"[0-9]", text) and text.startswith(words[0]):
        text = re.split(r"\s+of\s", text, maxsplit=1)[0]  # two thirds of the cake
        words = [word for word in re.findall(r"[^\W\d_]{2,}", text) if word.lower() not in NUMBER_WORDS | {"and"}]
    allowed = 0 if MATH.search(text) else 1
    return last_side(text) if len(words) <= allowed else None


_FORMULA_NAMES = "and or pi sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan abs floor ceil max min gcd lcm"
_FORMULA_WORDS = frozenset(_FORMULA_NAMES.split())


def last_number(text: str) -> str | None:
    """The last number, with its sign, currency and percent sign: 1,234.5, 3/4, 1 1/2, \\frac{3}{4}."""
    last = _last_numeral(text)
    return None if last is None else _signed(last)


def last_expression(text: str) -> str | None:
    """The last formula in $...$, \\(...\\) or \\[...\\] or the last number, whichever ends later; of a
    calculation its result."""
    end = text.rstrip(" .\n")
    in_dollars = end.endswith("$") and end.count("$") % 2 == 0
    if in_dollars and (over_lines := formula_over_lines(end[end.rfind("$", 0, -1) :])):
        return last_side(over_lines)
    formula = None
    for match in MATH.finditer(text):
        if is_formula(match):
            formula = match
    last = _last_numeral(text)
    if formula is not None and (last is None or last.end() <= formula.end()):
        return _unsettled_end(text, formula) or last_side(content_of(formula))
    return None if last is None else _unsettled_end(text, last) or _of_two_units(text, last) or _signed(last)


_TWO_UNITS = re.compile(
    r"(?<![0-9.,/$])[0-9]+ (?:feet|foot|ft|hours?|hrs?|years?|weeks?|days?|minutes?|mins?|meters?|kg|kilograms?"
    r"|km|kilometers?|pounds?|lbs?|yards?),?(?: and)? [0-9]+ (?:inch(?:es)?|minutes?|mins?|months?|days?|hours?|secs?"
    r"|cm|centimeters?|seconds?|grams?|meters?|ounces?|oz|feet)\b"
)


def _of_two_units(text: str, last: re.Match[str]) -> str | None:
    """The quantity of two units that ends in the last number: "5 feet 9 inches"."""
    for match in _TWO_UNITS.finditer(text, max(0, last.start() - 40), last.end() + 20):
        if match.start() < last.start() < match.end():
            return match[0]
    return None


_LABEL = re.compile(r"\W*[A-Za-z][A-Za-z_ ]{0,30}\"?:\W*")


def _unsettled_end(text: str, last: re.Match[str]) -> str | None:
    """The end of the sentence up to its last value where that is no answer: "it is either 14 or 23", "x is not 5"."""
    before = re.split(r"(?<=[.!?;])\s+|\n", text[max(0, last.start() - 150) : last.start()])[-1]
    sentence = before + text[last.start() : last.end()]
    value = re.split(r"\b(?:is|are|was|were|be|equals|lies|ranges|it's)\s+", sentence)[-1]
    for part in (sentence, value) if value != sentence else (sentence,):
        if unsettled(as_spoken(part), prose=True):
            return part
    label = _LABEL.match(sentence)
    if label and _FALSE_NAME.search(label[0]):
        return f"not {sentence[label.end() :]}"
    return sentence if label and bounded(as_spoken(sentence[label.end() :])) else None


def _last_numeral(text: str) -> re.Match[str] | None:
    """The last number of a text; it is looked for at the end first, as numerals are short."""
    for start in (max(0, len(text) - 200), 0):
        last = last_match(match for match in NUMBER.finditer(text, start) if _is_whole(match))
        if start == 0 or (last is not None and last.start() > start + 60):
            return last
    return None


def _is_whole(match: re.Match[str]) -> bool:
    """Whether no digit of another script next to a number spoils it, and no word of doubt in another language."""
    text = match.string
    if text[match.end() : match.end() + 1].isdigit() or text[match.start() - 1 : match.start()].isdigit():
        return False
    return text.isascii() or not denied_near(text[max(0, match.start() - 20) : match.end() + 8])


def _signed(match: re.Match[str]) -> str:
    """A number without a sign that is a subtraction ("9 - 4", "(x) -4")."""
    number = match[0]
    before = match.string[: match.start()].rstrip()
    if re.match(_SIGN, number) and before and (before[-1].isalnum() or before[-1] in ")]}"):
        stuck = match.string[match.start() + 1 : match.start() + 2] != " " and before != match.string[: match.start()]
        if not stuck:  # "is -4" has a space before the sign and none behind it
            number = number[1:]
    return number


def content_of(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def is_formula(match: re.Match[str]) -> bool:
    """Whether dollars enclose a formula rather than stand for money ("$5 for each and $")."""
    inside = content_of(match)
    if match[4] is None:
        return True
    if match.string[match.end() : match.end() + 1].isdigit():
        return False  # "$17, $52"
    bare = re.sub(r"\\[a-zA-Z]+|\\?\{[^{}]*\}", " ", inside)
    return bool(inside.strip()) and not re.search(r"[a-zA-Z]{2,}\s+\S*\s*[a-zA-Z]{2,}|^[0-9.,]+\s+[a-zA-Z]{2,}", bare)


def last_side(formula: str) -> str:
    """Of a calculation ("12 + 6 = 18") what it comes to; an equation with names is left as it is."""
    left, equals, right = formula.rpartition("=")
    names = re.search(r"[a-zA-Z]", re.sub(r"\\(?:[dt]?frac|times|cdot|div|text\s*\{[^{}]*\})", "", left))
    return right if equals and not names and not re.search(r"[<>!:\\]$", left) else formula
