"""Answers that are said in a sentence: "The answer is 42", "the answer is not 7 but 8", also in other languages."""

from __future__ import annotations

import re

from rl_lora.rewards.math.hedges import goes_on, twice, unsettled
from rl_lora.rewards.math.languages import (
    listed_elsewhere,
    said_elsewhere,
    unsure_elsewhere,
    without_another,
)
from rl_lora.rewards.math.markers import boxed, last_match
from rl_lora.rewards.math.spans import (
    MATH,
    NUMBER,
    as_spoken,
    content_of,
    formula_over_lines,
    half_behind,
    is_formula,
    last_number,
    last_side,
)

_PHRASE = re.compile(
    r"(?<![\w/-])(?:(?:final\s+|correct\s+)?answers?|correct\s+(?:option|choice))"
    r"(?:\s+to\s+[^.\n:]{0,60}?)?(?:\*\*|__)?\s*"
    r"(?:is|are|=|:|equals|would\s+be|will\s+be|should\s+be)(?:\*\*|__)?"
    r"(?:\s*:|\s+(?:therefore|thus|then|simply|just|equal\s+to|given\s+by|option|choice))*\s*",
    re.IGNORECASE,
)
_MAYBE = re.compile(
    r"(?<![\w/-])answers?\s+(?:(?:could|may|might|can|must|should|would|will)(?:\s+(?:also|well|only))?(?:\s+(?P<not>not))?"
    r"|(?P<no>cannot|can't|couldn't|won't|wouldn't|shouldn't|mustn't))\s+be\s+",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"n't\s+")
_WHICH = re.compile(
    r"\s*,?\s*(?:which\s+(?:is|equals|makes|gives)|so|namely|i\.\s?e\.,?|that\s+is,?)\s+(?=[-$\\(*]*[0-9])"
)
_CAME_TO = re.compile(
    r"[0-9.,$]+ (?:times|plus|minus|and|(?:divided|multiplied) by) [0-9.,$]+ (?:is|are|equals|makes|gives) "
    r"([-$]*[0-9][^=]*)"
)
_CALCULATED = re.compile(r"[0-9.,$]+ (?:times|plus|minus|(?:divided|multiplied) by) [0-9.,$]+")
_CONTRARY = re.compile(r"\s*,?\s*but\s+(?:rather\s+|instead\s+)?(?=[-$\\(*]*[0-9])")
_END_OF_ANSWER = re.compile(
    r"\n|(?<=[^\s.\\])[.!?;](?=\s|$|\*)|,?\s+(?:because|since|so|as(?!\s+(?:many|much)\b)|which|therefore|but|and\s+not|rather\s+than|instead\s+of)\b"
    r"|,?\s+i\.\s?e\b|,\s+(?!(?:and|or|sin|cos|tan|ln|log)\b)[a-z]{2,}|(?<=[0-9%}$])\s+of\b|\s+\((?=[a-z]{3,})"
)


def phrase(text: str) -> str | None:
    """What "the answer is ..." says last (also "Final answer: ...", "**Answer:** ..."): the formula in dollars that it
    names, else up to the end of the sentence; behind an equals sign only its last side ("12 + 6 = 18" is 18)."""
    last = last_match(_PHRASE.finditer(text))
    elsewhere = said_elsewhere(text)
    if elsewhere and (last is None or last.end() < elsewhere.end()):
        last = elsewhere
        if elsewhere["not"]:
            return f"not {text[last.end() :]}"
    else:
        elsewhere = None
    if " be " in text and (maybe := last_match(_MAYBE.finditer(text))) and (last is None or last.end() < maybe.end()):
        unsure = _unsure(maybe)
        if unsure is not None:
            return unsure
    if last is None:
        return None
    rest = text[last.end() :].lstrip()
    rest = rest[1:].lstrip() if rest[:1] == ":" else rest
    found = boxed(rest)
    if found is not None:
        return found
    if (formula := formula_over_lines(rest)) is not None:
        return last_side(formula)
    opening = MATH.match(rest)
    more = opening and re.match(r"\s*(?:,\s*)?(?:,|and|or)\s*(?:\$|\\\()", rest[opening.end() :])
    several = more or (opening and goes_on(as_spoken(rest[opening.end() :])))
    if opening and is_formula(opening) and not several:
        return last_side(content_of(opening)) + half_behind(rest, opening)
    line, behind = _sentence(rest)
    if denial := _DENIAL.match(line):
        line = f"not {line[denial.end() :]}"
    elif _FALSE_LABEL.search(text[max(0, last.start() - 30) : last.start()]) or _FALSE_BEHIND.match(behind):
        return f"not {line}"
    if last is elsewhere:
        return _elsewhere(line, behind)
    return _said(line, behind, several=bool(several))


def _said(line: str, behind: str, several: bool) -> str | None:
    """The value that a sentence behind "the answer is" names. line: the sentence; behind: the text that follows it;
    several: a list goes on behind the formula that the sentence begins with."""
    if not NUMBER.match(line) and (result := _WHICH.match(behind)):  # the sum of 12 and 5, which is 17
        line, behind = _sentence(behind[result.end() :])
    if line.startswith("not ") and (contrary := _CONTRARY.match(behind)):  # not 12 but 17
        line, behind = _sentence(behind[contrary.end() :])
    if same := twice(line, behind.split("\n")[0][:100]):
        return same
    if goes_on(as_spoken(behind)) and NUMBER.search(as_spoken(line)):
        return line + behind.splitlines()[0]
    if not NUMBER.match(line) and unsettled(as_spoken(line)):
        return re.sub(r"^\W*(?:either|both)\s+", "", line)
    if (result := _WHICH.match(behind)) and _CALCULATED.fullmatch(line):
        line, behind = _sentence(behind[result.end() :])
    if came := _CAME_TO.fullmatch(line):  # 13 times 2 is 26
        return came[1]
    if re.match(r"[A-Za-z]{2,} ", line):  # "Final answer: the largest $n$ is 34"
        line = re.split(r"\b(?:is|are|equals)\s+(?=\S)", line)[-1]
    if several or line.startswith("not "):
        return line
    if not NUMBER.match(line) and unsettled(as_spoken(line)):
        return re.sub(r"^\W*(?:either|both)\s+", "", line)
    for segment in MATH.finditer(line):
        if is_formula(segment):
            return last_side(content_of(segment))
    bold = re.search(r"\*\*(.+?)\*\*", line)
    if bold and goes_on(as_spoken(line[bold.end() :])):
        return line
    line = bold[1] + half_behind(line, bold) if bold else line.strip("*_ ")
    if "=" in line and last_side(line) != line:
        return last_side(line)
    start = NUMBER.match(line)
    if start or not NUMBER.search(line):
        return line
    before = line[: NUMBER.search(line).start()]  # type: ignore[union-attr]
    if re.search(r"[A-Za-z][(^*/]$", before):  # sqrt(2)
        return line
    words = re.findall(r"[A-Za-z]{3,}", before)
    return last_number(line) if words and "\\" not in line else line


_FALSE_LABEL = re.compile(
    r"(?:^|[.!?;:\n*])\W*(?:(?:an?|the)\s+)?(?:wrong|incorrect|false|invalid|not(?:\s+(?:an?|the|my|our))?)\s+$",
    re.IGNORECASE,
)
_FALSE_BEHIND = re.compile(
    r",?\s*(?:which|but\s+(?:that|this|it))\s+(?:is|was)\s+(?:wrong|incorrect|false|not\s+(?:right|correct|true))\b",
    re.IGNORECASE,
)
"""What says of an answer that it is none: "Wrong answer: 73", "the answer is 42, which is wrong"."""


def _sentence(rest: str) -> tuple[str, str]:
    """A text up to the end of the answer that it begins with, and what follows."""
    end = _END_OF_ANSWER.search(rest)
    return (rest[: end.start()].strip(), rest[end.start() :]) if end else (rest.strip(), "")


def _elsewhere(line: str, behind: str) -> str | None:
    """The value behind "the answer is" in another language; None where a sentence there has none."""
    line = re.sub(r"^(?:[负負]|マイナス|마이너스|минус|minus)\s*(?=[0-9])", "-", without_another(line))
    if both := listed_elsewhere(line):
        return both
    if unsure_elsewhere(line):
        return f"not {line}"
    number = NUMBER.search(line)
    opening = MATH.match(line)
    if opening and is_formula(opening):
        return last_side(content_of(opening))
    if number and not NUMBER.match(line.lstrip("*_ $")) and re.match(r"[^\W\d_]{2,}|[^\W\d_A-Za-z]", line):
        return last_number(line) if re.match(r"\s*[^\s0-9]*\s*[^0-9]*$", line[number.end() :]) else line
    return re.sub(r"\s*(?:입니다|이다|です|だ|となる|になる)$", "", line.strip("*_ "))


def _unsure(maybe: re.Match[str]) -> str | None:
    """What stands behind "the answer could be" or "cannot be" if it is no answer and no other value follows."""
    line, behind = _sentence(maybe.string[maybe.end() :])
    denied = maybe["not"] or maybe["no"]
    if denied and not NUMBER.search(behind):
        return f"not {line}"
    spoken = as_spoken(line)
    if (unsettled(spoken) and not NUMBER.search(behind)) or goes_on(as_spoken(behind)):
        return line + behind.splitlines()[0] if behind.strip() else line
    return None
