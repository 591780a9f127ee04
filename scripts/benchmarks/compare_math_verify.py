"""Where our verdicts and Math-Verify's differ, and who is right.

`python scripts/benchmarks/compare_math_verify.py --files math500.jsonl gsm8k_test.jsonl`: each reference in
several dresses (right) and beside near misses (wrong), so the right verdict is known by construction. Math-Verify is
called as its README says: with its time-outs, and formulas as references between dollars.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

from rl_lora.config import expand_home
from rl_lora.rewards import Outcome, verify
from rl_lora.scripts.command import main as command


@dataclass
class CompareMathConfig:
    """Judge the answers of data sets in several notations, and near misses, in rl_lora and in Math-Verify."""

    files: list[str] = field(default_factory=list)
    """Data sets, as JSONL files."""
    column: str = "answer"
    """Column with the answer; of a text with ####, the part behind it."""
    limit: Annotated[int, Ge(0)] = 200
    """Rows of each file, drawn at random; 0 takes all."""
    show: Annotated[int, Ge(0)] = 3
    """Differences to show for each kind of case."""

    def __post_init__(self) -> None:
        expand_home(self, "files")


@dataclass
class Case:
    """One completion with what is known of it."""

    kind: str
    completion: str
    reference: str
    right: bool


FORMULA = re.compile(r"[\\^_=a-z,(\[]")
PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def answers_of(path: str, column: str) -> list[tuple[str, str]]:
    """(the column's text, its answer) of every row. Raises ValueError where the column is missing."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if column not in row:
            raise ValueError(f"{path}, line {number}: no column {column!r}; there are {', '.join(row)}")
        value = row[column]
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        found.append((text, text.rpartition("####")[2].strip()))
    return found


def cases_of(answers: list[tuple[str, str]], draw: random.Random) -> Iterator[Case]:
    """Dresses of each answer and near misses of it."""
    values = [value for _, value in answers]
    for text, value in answers:
        if "####" in text:
            yield Case("solution text", text, value, True)
        yield Case("in a box", rf"So it is $\boxed{{{value}}}$.", value, True)
        formula = f"${value}$" if FORMULA.search(value) else value
        yield Case("in prose", f"The answer is {formula}.", value, True)
        yield Case("in bold", f"**Answer:** **{value}**", value, True)
        if PLAIN.fullmatch(value):
            yield Case("with a noun", f"She has {value} red apples.", value, True)
            yield Case("reference with a unit", f"The answer is {value}.", f"{value} (apples)", True)
            yield Case("next number", rf"\boxed{{{float(value) + 1:g}}}", value, False)
            yield Case("denied", f"The answer is not {value}.", value, False)
        else:
            yield Case("changed", rf"\boxed{{({value})+1}}", value, False)
        other = draw.choice(values)
        if other != value:
            yield Case("another row's", rf"\boxed{{{other}}}", value, False)


def math_verify_says(case: Case) -> bool:
    """Math-Verify's verdict, False where it fails."""
    from math_verify import parse
    from math_verify import verify as equal

    try:
        gold = f"${case.reference}$" if FORMULA.search(case.reference.replace("(apples)", "")) else case.reference
        return bool(equal(parse(gold), parse(case.completion)))
    except Exception:
        return False


def run(config: CompareMathConfig) -> None:
    """Print the table and some differences. Raises ValueError where a file lacks the column."""
    if not config.files:
        raise ValueError("files: name at least one data set")
    logging.disable(logging.CRITICAL)
    print("| file | case | right verdict | n | ours right | Math-Verify right | only ours | only Math-Verify's |")
    print("|---|---|---|---|---|---|---|---|")
    shown: list[str] = []
    for path in config.files:
        draw = random.Random(0)
        answers = answers_of(path, config.column)
        answers = draw.sample(answers, config.limit) if 0 < config.limit < len(answers) else answers
        kinds: dict[tuple[str, bool], list[tuple[Case, bool, bool]]] = {}
        for case in cases_of(answers, draw):
            ours = (verify(case.completion, case.reference).outcome is Outcome.CORRECT) == case.right
            theirs = math_verify_says(case) == case.right
            kinds.setdefault((case.kind, case.right), []).append((case, ours, theirs))
        for (kind, right), judged in kinds.items():
            n = len(judged)
            counts = [sum(ours for _, ours, _ in judged), sum(theirs for *_, theirs in judged)]
            only = [[case for case, a, b in judged if (a, b) == who] for who in ((True, False), (False, True))]
            label = "correct" if right else "wrong"
            numbers = " | ".join(map(str, [n, *counts, *map(len, only)]))
            print(f"| {Path(path).stem} | {kind} | {label} | {numbers} |", flush=True)
            for who, cases in zip(("only ours is right", "only Math-Verify's is right"), only, strict=True):
                shown += [f"{who}: {case.completion[-90:]!r} for {case.reference!r}" for case in cases[: config.show]]
    print("\n" + "\n".join(dict.fromkeys(shown)))


def main() -> None:
    command(CompareMathConfig, run)


if __name__ == "__main__":
    main()
