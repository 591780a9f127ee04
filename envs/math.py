"""Mathematics problems with a verifiable answer: GSM8K, MATH, SVAMP and their like, or a data set of your own."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rl_lora.envs.finite import FiniteEnv
from rl_lora.envs.jsonl import DataRow
from rl_lora.envs.prompts import as_text
from rl_lora.envs.records import is_file, read_records
from rl_lora.envs.split import check_fraction, check_split, split_of
from rl_lora.envs.templates import check_placeholders, fill, placeholders
from rl_lora.envs.text import Problem
from rl_lora.rewards import RewardSpec
from rl_lora.system.plurals import counted

QUESTION_COLUMNS = ("question_concat", "question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "result", "solution")
"""Where questions and answers stand if no column is named: the first of these, in any case, that a data set has.
question_concat comes first: beside it, SVAMP's Question is only the last sentence of the problem."""
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's annotations of its solutions, which no reply should have."""
WHOLE = re.compile(r"(?<![\w.])(\d+)\.0(?![\w.])")
"""Whole numbers as SVAMP's equations write them: 290.0 / 2.0."""
OVERLAPS = ("refuse", "drop", "allow")


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
    """A row of a data set, read: the question as it stands there, and what is made of it."""

    question: str
    problem: Problem


@dataclass(frozen=True)
class Templates:
    """How an item is made of a row: columns, what is asked, what solves it. A preset's demonstration may be missing."""

    columns: tuple[str | None, str | None]
    template: str
    demonstration: str | None
    preset: bool


class MathEnv(FiniteEnv):
    """`rl_lora/Math-v0`: questions with one answer, judged by a verifier.

    Args:
        dataset: gsm8k, math (evaluated on MATH-500), math500, svamp, mawps, aime or deepmath, read from the Hugging
            Face hub (`pip install 'rl_lora[data]'`) unless `path` and `eval_path` say otherwise. A list is a mixture.
        path, eval_path: a .jsonl or .parquet file, a folder that `datasets` reads, or a data set's id on the hub, in
            place of the two sides of `dataset`, or without it; or lists of them, for a mixture. Where there is no data
            for evaluation, a share of `path` is held out.
        eval_fraction: that share; the hash of a question's normalised text decides, so equal ones are on one side.
        question_column, answer_column: by default the first that is there of question_concat, question, problem,
            prompt, and of answer, final_answer, result, solution. What an answer may look like is the verifier's
            business: it takes what stands behind "####", or in \\boxed{}.
        template: what is asked; {question}, or {name} for the column of that name, but never the answer.
        demonstration: a reply that solves the problem, for `rl-lora sft` and `few_shot`: a template in which
            {answer} and all columns may stand. GSM8K's <<calculations>> are left out.
        few_shot: so many problems of the training side stand solved before every question, and are not trained on.
        limit: at most so many problems, the first ones of the side.
        reward: see `rewards.resolve`.
        split: "train" or "eval".
        overlap: what becomes of problems for training whose normalised text is among those of evaluation: "refuse" is
            an error with their number, "drop" leaves them out of training, "allow" keeps them.

    Raises:
        ValueError: an argument that cannot be, data that cannot be read, training problems that are in the evaluation.
    """

    def __init__(
        self,
        dataset: str | Sequence[str] | None = None,
        path: str | Sequence[str] | None = None,
        eval_path: str | Sequence[str] | None = None,
        eval_fraction: float = 0.1,
        question_column: str | None = None,
        answer_column: str | None = None,
        template: str = BOXED,
        demonstration: str | None = None,
        few_shot: int = 0,
        limit: int | None = None,
        reward: RewardSpec = "math",
        split: str = "train",
        overlap: str = "refuse",
    ) -> None:
        super().__init__(reward)
        check_split(split)
        check_fraction(eval_fraction)
        datasets, paths, eval_paths = _names(dataset), _names(path), _names(eval_path)
        if not datasets and not paths and not eval_paths:
            raise ValueError(f"name a dataset ({', '.join(PRESETS)}), or give a path")
        if unknown := [name for name in datasets if name not in PRESETS]:
            raise ValueError(
                f"dataset must be one of {', '.join(PRESETS)}, got {unknown[0]!r}; of others give the path"
            )
        if len(datasets) > 1 and paths and len(paths) != len(datasets):
            raise ValueError(
                f"a mixture has a path for each dataset, or none, got {len(datasets)} datasets and {len(paths)} paths"
            )
        for name, value in {"few_shot": few_shot, "limit": limit}.items():
            if isinstance(value, bool) or not isinstance(value, int if name == "few_shot" else int | None):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if few_shot < 0 or (limit is not None and limit < 1):
            raise ValueError(f"few_shot must be >= 0 and limit >= 1, got {few_shot} and {limit}")
        if overlap not in OVERLAPS:
            raise ValueError(f"overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
        templates = Templates((question_column, answer_column), template, demonstration, False)
        data = (datasets, paths, eval_paths)
        self.problems = _problems(data, templates, float(eval_fraction), few_shot, split, overlap)[:limit]


Names = tuple[str, ...]
Data = tuple[Names, Names, Names]
"""Names of data sets, paths of data, and paths of data for evaluation."""


def _names(names: str | Sequence[str] | None) -> Names:
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"datasets and paths are texts, or lists of texts, got {names!r}")
    return names


@functools.lru_cache(maxsize=8)
def _problems(
    data: tuple[Names, Names, Names],
    templates: Templates,
    eval_fraction: float,
    few_shot: int,
    split: str,
    overlap: str,
) -> tuple[Problem, ...]:
    """What `MathEnv` asks, made once for all of its copies: a rollout plays hundreds of them."""
    train, held_out = _sides(data, templates)
    if train and not held_out:
        train, held_out = _divided(train, eval_fraction)
    elif overlap != "allow":
        evaluated = {normalized(item.question) for item in held_out}
        kept = tuple(item for item in train if normalized(item.question) not in evaluated)
        if overlap == "refuse" and len(kept) < len(train):
            raise ValueError(
                f"{len(train) - len(kept)} training problems are among those of evaluation (normalised text): what "
                "would be measured has been trained on; --env.kwargs.overlap drop leaves them out, allow keeps them"
            )
        train = kept
    if few_shot > len(train):
        raise ValueError(f"few_shot={few_shot} needs as many training problems; there are {len(train)}")
    examples = [item.problem for item in train[:few_shot]]
    if any(example.demonstration is None for example in examples):
        raise ValueError("few_shot needs a demonstration: a template of the solved problem's reply")
    side = train[few_shot:] if split == "train" else held_out
    if not side:
        raise ValueError(
            f"there are no problems for split {split!r}; give {'path' if split == 'train' else 'eval_path'}"
        )
    before = "".join(f"{example.question}\n{example.demonstration}\n\n" for example in examples)
    return tuple(item.problem._replace(question=before + item.problem.question) for item in side)


def _sides(data: Data, templates: Templates) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The items for training and for evaluation. What is given by path replaces a side of the presets as a whole."""
    datasets, paths, eval_paths = data
    presets = [PRESETS[name] for name in datasets] or [Preset(None, None)]

    def made(preset: Preset) -> Templates:
        return replace(templates, demonstration=preset.demonstration, preset=True)

    own = templates.demonstration is not None
    train, held_out = [], []
    for i, preset in enumerate(presets):
        sides = [preset.train]
        if paths:  # of one data set, several files; of several, a file each
            sides = [Side(path, "train") for path in (paths if len(presets) == 1 else paths[i : i + 1])]
        train += [item for side in sides for item in _items(side, templates if own else made(preset))]
    if eval_paths:
        held_out = [item for path in eval_paths for item in _items(Side(path, "test"), made(presets[0]))]
    elif not paths:  # data of one's own are not evaluated on somebody else's
        held_out = [item for preset in presets for item in _items(preset.eval, made(preset))]
    return tuple(train), tuple(held_out)


def normalized(question: str) -> str:
    """Words, numbers and signs of a question, in lower case: what two copies of a problem have in common, whatever
    their spaces, punctuation and dollar signs."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;:!?'\"`$\\]", question.casefold()))


def _divided(items: Sequence[Item], fraction: float) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    sides: dict[str, list[Item]] = {"train": [], "eval": []}
    for item in items:
        sides[split_of(normalized(item.question), fraction)].append(item)
    return tuple(sides["train"]), tuple(sides["eval"])


@functools.lru_cache(maxsize=32)
def _items(side: Side | None, templates: Templates) -> tuple[Item, ...]:
    if side is None:
        return ()
    rows = [row for name in side.names for row in read_records(side.data, side.split, name)]
    question, answer = (
        _column(rows[0], named, usual, f"{side.data}: its {what} column")
        for named, usual, what in zip(
            templates.columns, (QUESTION_COLUMNS, ANSWER_COLUMNS), ("question", "answer"), strict=True
        )
    )
    if not is_file(side.data):  # nobody can mend a row of somebody else's data set
        whole = [row for row in rows if all(_there(row.columns.get(c)) for c in (question, answer))]
        if n := len(rows) - len(whole):
            warnings.warn(f"{side.data}: {counted(n, 'row')} without question or answer left out", stacklevel=2)
        rows = whole
    read = [_texts(row, question, answer, f"{side.data}, row {row.line}") for row in rows]
    asked = _filled(templates.template, "template", read, answers=False)
    solution = templates.demonstration
    if solution is not None and templates.preset and not placeholders(solution) <= set(read[0]):
        solution = None
    shown = [None] * len(rows) if solution is None else _filled(solution, "demonstration", read)
    return tuple(
        Item(columns["question"], Problem(text, row.columns[answer], reply, record=row.columns, place=row.place))
        for row, columns, text, reply in zip(rows, read, asked, shown, strict=True)
    )


def _there(value: object) -> bool:
    return value is not None and bool(str(value).strip())


def _column(row: DataRow, named: str | None, usual: Sequence[str], what: str) -> str:
    lower = {name.lower(): name for name in row.columns}
    for name in (named,) if named is not None else usual:
        if name in row.columns:
            return name
        if name.lower() in lower:
            return lower[name.lower()]
    wanted = repr(named) if named is not None else " or ".join(usual)
    raise ValueError(f"{what} ({wanted}) is not there; there are {', '.join(map(repr, row.columns))}")


def _texts(row: DataRow, question_column: str, answer_column: str, where: str) -> dict[str, str]:
    """All columns of a row as texts, by their names in lower case, and `question` and `answer`."""
    question, reference = row.columns.get(question_column), row.columns.get(answer_column)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: {question_column!r} must be a text, got {question!r}")
    if not _there(reference):
        raise ValueError(f"{where}: {answer_column!r} is empty")
    columns = {name.lower(): as_text(value) for name, value in row.columns.items()}
    return columns | {"question": question.strip(), "answer": as_text(reference)}


def _filled(template: str, what: str, rows: Sequence[dict[str, str]], *, answers: bool = True) -> list[str]:
    check_placeholders(what, template, rows[0])
    names = {name for name in placeholders(template) if name in rows[0]}
    hidden = set() if answers else {"answer", *ANSWER_COLUMNS}
    if not names - hidden:
        raise ValueError(f"{what} must name a column in braces ({', '.join(rows[0])}), got {template!r}")
    if leaked := names & hidden:
        raise ValueError(f"{what} would show the answer: it names {', '.join(sorted(leaked))}")
    filled = [CALCULATOR.sub("", fill(template, {name: row.get(name, "") for name in names})) for row in rows]
    return [WHOLE.sub(r"\1", text) for text in filled] if answers else filled
