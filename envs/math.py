"""Mathematics problems with a verifiable answer: GSM8K, MATH, SVAMP and their like, or a data set of your own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from envs.finite import FiniteEnv
from envs.jsonl import Row
from envs.prompts import as_text
from envs.records import read_records
from envs.split import check_fraction, check_split, split_of
from envs.text import Problem, fill, placeholders
from rewards import RewardSpec

QUESTION_COLUMNS = ("question", "problem", "question_concat", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "result", "solution")
"""Where questions and answers stand if no column is named: the first of these, in any case, that a data set has."""
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's annotations of its solutions, which no reply should have."""


@dataclass(frozen=True)
class Side:
    """Where one side of a data set is on the Hugging Face hub; of several configurations, all together."""

    data: str
    split: str
    names: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Preset:
    """A data set under its usual name. Without an own side for evaluation, a share of the other one is held out."""

    train: Side | None
    eval: Side | None
    demonstration: str | None = None


SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
PRESETS = {
    "gsm8k": Preset(Side("openai/gsm8k", "train", ("main",)), Side("openai/gsm8k", "test", ("main",)), "{answer}"),
    "math": Preset(
        Side("EleutherAI/hendrycks_math", "train", SUBJECTS), Side("HuggingFaceH4/MATH-500", "test"), "{solution}"
    ),
    "math500": Preset(None, Side("HuggingFaceH4/MATH-500", "test")),
    "svamp": Preset(Side("ChilleD/SVAMP", "train"), Side("ChilleD/SVAMP", "test"), "{equation} = {answer}"),
    "mawps": Preset(Side("MU-NLPC/Calc-mawps", "train"), Side("MU-NLPC/Calc-mawps", "test"), "{answer}"),
    "aime": Preset(None, Side("HuggingFaceH4/aime_2024", "train")),
    "deepmath": Preset(Side("zwhe99/DeepMath-103K", "train"), None),
}


@dataclass(frozen=True)
class Item:
    """A row of a data set, read: the question, the reference, and all columns as texts."""

    question: str
    reference: Any
    columns: dict[str, str]


class MathEnv(FiniteEnv):
    """`rl_lora/Math-v0`: questions with one answer, judged by a verifier.

    Args:
        dataset: gsm8k, math (evaluated on MATH-500), math500, svamp, mawps, aime or deepmath, read from the Hugging
            Face hub (`pip install 'rl_lora[data]'`) unless `path` and `eval_path` say otherwise.
        path, eval_path: a .jsonl or .parquet file, or a data set's id on the hub, in place of the two sides of
            `dataset`, or without it. Where there is no data for evaluation, a share of `path` is held out.
        eval_fraction: that share; the hash of a question's normalised text decides, so equal ones are on one side.
        question_column, answer_column: by default the first that is there of question, problem, question_concat,
            prompt, and of answer, final_answer, result, solution. What an answer may look like is the verifier's
            business: it takes what stands behind "####", or in \\boxed{}.
        template: what is asked; {question}, or {name} for the column of that name, but never the answer.
        demonstration: a reply that solves the problem, for `scripts/sft.py` and `few_shot`: a template in which
            {answer} and all columns may stand. GSM8K's <<calculations>> are left out.
        few_shot: so many problems of the training side stand solved before every question, and are not trained on.
        limit: at most so many problems, the first ones of the side.
        reward: see `rewards.resolve`.
        split: "train" or "eval".
        allow_overlap: take problems for training whose normalised text is among those of evaluation.

    Raises:
        ValueError: an argument that cannot be, data that cannot be read, training problems that are in the evaluation.
    """

    def __init__(
        self,
        dataset: str | None = None,
        path: str | None = None,
        eval_path: str | None = None,
        eval_fraction: float = 0.1,
        question_column: str | None = None,
        answer_column: str | None = None,
        template: str = BOXED,
        demonstration: str | None = None,
        few_shot: int = 0,
        limit: int | None = None,
        reward: RewardSpec = "math",
        split: str = "train",
        allow_overlap: bool = False,
    ) -> None:
        super().__init__(reward)
        check_split(split)
        check_fraction(eval_fraction)
        if dataset is None and path is None and eval_path is None:
            raise ValueError(f"name a dataset ({', '.join(PRESETS)}), or give a path")
        if dataset is not None and dataset not in PRESETS:
            raise ValueError(f"dataset must be one of {', '.join(PRESETS)}, got {dataset!r}; of others give the path")
        if few_shot < 0 or (limit is not None and limit < 1):
            raise ValueError(f"few_shot must be >= 0 and limit >= 1, got {few_shot} and {limit}")
        self.problems = _problems(
            dataset,
            path,
            eval_path,
            float(eval_fraction),
            (question_column, answer_column),
            template,
            demonstration,
            few_shot,
            split,
            allow_overlap,
        )[:limit]


@functools.lru_cache(maxsize=8)
def _problems(
    dataset: str | None,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    columns: tuple[str | None, str | None],
    template: str,
    demonstration: str | None,
    few_shot: int,
    split: str,
    allow_overlap: bool,
) -> tuple[Problem, ...]:
    """What `MathEnv` asks, made once for all of its copies: a rollout plays hundreds of them."""
    preset = PRESETS.get(dataset or "", Preset(None, None))
    demonstration = preset.demonstration if demonstration is None else demonstration
    train = _items(Side(path, "train") if path else preset.train, columns)
    held_out = _items(Side(eval_path, "test") if eval_path else preset.eval, columns)
    if eval_path is None and path is not None:
        held_out = ()  # data of one's own are not evaluated on somebody else's
    if train and not held_out:
        train, held_out = _divided(train, eval_fraction)
    elif not allow_overlap and (n := len({normalized(i.question) for i in train} & _questions(held_out))):
        raise ValueError(
            f"{n} training problems are among those of evaluation (normalised text): what would be measured has "
            "been trained on; remove them, or set allow_overlap=True"
        )
    if few_shot > len(train):
        raise ValueError(f"few_shot={few_shot} needs as many training problems; there are {len(train)}")
    if few_shot and demonstration is None:
        raise ValueError("few_shot needs a demonstration: a template of the solved problem's reply")
    side = train[few_shot:] if split == "train" else held_out
    if not side:
        raise ValueError(
            f"there are no problems for split {split!r}; give {'path' if split == 'train' else 'eval_path'}"
        )
    asked = _filled(template, "template", side, answers=False)
    shown = [None] * len(side) if demonstration is None else _filled(demonstration, "demonstration", side)
    before = ""
    if few_shot and demonstration is not None:
        examples = train[:few_shot]
        pairs = zip(
            _filled(template, "template", examples, answers=False),
            _filled(demonstration, "demonstration", examples),
            strict=True,
        )
        before = "".join(f"{question}\n{solution}\n\n" for question, solution in pairs)
    return tuple(
        Problem(before + question, item.reference, solution)
        for question, item, solution in zip(asked, side, shown, strict=True)
    )


def normalized(question: str) -> str:
    """Letters and digits of a question, in lower case: what two copies of a problem have in common."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def _questions(items: Sequence[Item]) -> set[str]:
    return {normalized(item.question) for item in items}


def _divided(items: Sequence[Item], fraction: float) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    sides: dict[str, list[Item]] = {"train": [], "eval": []}
    for item in items:
        sides[split_of(normalized(item.question), fraction)].append(item)
    return tuple(sides["train"]), tuple(sides["eval"])


@functools.lru_cache(maxsize=8)
def _items(side: Side | None, columns: tuple[str | None, str | None]) -> tuple[Item, ...]:
    if side is None:
        return ()
    rows = [row for name in side.names for row in read_records(side.data, side.split, name)]
    question, answer = (
        _column(rows[0], named, usual, f"{side.data}: its {what} column")
        for named, usual, what in zip(columns, (QUESTION_COLUMNS, ANSWER_COLUMNS), ("question", "answer"), strict=True)
    )
    return tuple(_item(row, question, answer, f"{side.data}, row {row.line}") for row in rows)


def _column(row: Row, named: str | None, usual: Sequence[str], what: str) -> str:
    lower = {name.lower(): name for name in row.columns}
    for name in (named,) if named is not None else usual:
        if name in row.columns:
            return name
        if name.lower() in lower:
            return lower[name.lower()]
    wanted = repr(named) if named is not None else " or ".join(usual)
    raise ValueError(f"{what} ({wanted}) is not there; there are {', '.join(map(repr, row.columns))}")


def _item(row: Row, question_column: str, answer_column: str, where: str) -> Item:
    question, reference = row.columns.get(question_column), row.columns.get(answer_column)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: {question_column!r} must be a text, got {question!r}")
    if reference is None or (isinstance(reference, str) and not reference.strip()):
        raise ValueError(f"{where}: {answer_column!r} is empty")
    columns = {name.lower(): as_text(value) for name, value in row.columns.items()}
    return Item(question.strip(), reference, columns | {"question": question.strip(), "answer": as_text(reference)})


def _filled(template: str, what: str, items: Sequence[Item], *, answers: bool = True) -> list[str]:
    names = {name for name in placeholders(template) if name in items[0].columns}
    hidden = set() if answers else {"answer", *ANSWER_COLUMNS}
    if not names - hidden:
        raise ValueError(f"{what} must name a column in braces ({', '.join(items[0].columns)}), got {template!r}")
    if leaked := names & hidden:
        raise ValueError(f"{what} would show the answer: it names {', '.join(sorted(leaked))}")
    clean: Callable[[str], str] = functools.partial(CALCULATOR.sub, "")
    return [clean(fill(template, {name: item.columns.get(name, "") for name in names})) for item in items]
