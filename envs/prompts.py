"""A file of prompts and a reward function make an environment. Text only: no chat messages, no data-set hubs."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from envs.finite import FiniteEnv
from envs.jsonl import Row, Source, locate, read_rows
from envs.split import check_fraction, check_split, split_of
from envs.text import Problem, check_placeholders, fill, placeholders
from rewards import RewardSpec


class PromptsEnv(FiniteEnv):
    """`rl_lora/Prompts-v0`: the prompts of a JSONL file, judged by any reward function.

    Args:
        path: a JSONL file, one object a line. Read once a process, however many copies of the environment there are.
        reward: see `rewards.resolve`.
        prompt_column: where the prompt stands, a text. It is also what the split goes by.
        reference_column: where the reference for the reward function stands, any JSON; None if there is none.
        template: the question. {prompt} stands for the prompt, {name} for the column of that name, but never for the
            reference; all other braces stay as they are.
        demonstration: a reply that solves the problem, as a template like the question's, in which the reference may
            stand: "{equation} = {answer}". For `scripts/sft.py`.
        split: "train" or "eval".
        eval_path: a file of its own for "eval"; `path` is then "train" as a whole.
        eval_fraction: without `eval_path`, about this share of the prompts is held out, by a hash of their text:
            equal prompts are on the same side, and a row that is added moves no other.

    Raises:
        ValueError: an argument that cannot be, a file that cannot be read or is malformed, a split without a problem.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        reward: RewardSpec = "numeric",
        prompt_column: str = "prompt",
        reference_column: str | None = "answer",
        template: str = "{prompt}",
        demonstration: str | None = None,
        split: str = "train",
        eval_path: str | os.PathLike[str] | None = None,
        eval_fraction: float = 0.1,
    ) -> None:
        super().__init__(reward)
        check_split(split)
        if not isinstance(prompt_column, str) or not isinstance(reference_column, str | None):
            raise ValueError(f"columns must be named by a text, got {prompt_column!r} and {reference_column!r}")
        if prompt_column == reference_column:
            raise ValueError(f"prompt_column and reference_column must differ, got {prompt_column!r} for both")
        placeholders(template)
        if demonstration is not None:
            placeholders(demonstration)
        templates = (template, demonstration)
        check_fraction(eval_fraction)
        sources = {"train": locate(path), "eval": locate(path if eval_path is None else eval_path)}
        keep = (split, float(eval_fraction)) if eval_path is None else None
        self.problems = _problems(sources[split], (prompt_column, reference_column), templates, keep)


Columns = tuple[str, str | None]
"""The names of the prompt column and of the reference column, if there is one."""
Templates = tuple[str, str | None]
"""Of the question, and of the demonstration, if there is one."""


@functools.lru_cache(maxsize=16)
def _problems(
    source: Source, columns: Columns, templates: Templates, keep: tuple[str, float] | None
) -> tuple[Problem, ...]:
    """The problems of a file; with keep = (split, eval_fraction), those of one side."""
    entries = _entries(source, columns, templates)
    if keep is None:
        return tuple(problem for _, problem in entries)
    split, fraction = keep
    problems = tuple(problem for prompt, problem in entries if split_of(prompt, fraction) == split)
    if not problems:
        raise ValueError(
            f"split {split!r} of {source.path} is empty: with eval_fraction {fraction} none of its {len(entries)} "
            "problems is on this side; change eval_fraction, or give eval_path a file of its own"
        )
    return problems


@functools.lru_cache(maxsize=8)
def _entries(source: Source, columns: Columns, templates: Templates) -> tuple[tuple[str, Problem], ...]:
    """The prompt and the problem of each row; both splits share them."""
    rows = read_rows(source)
    template, demonstration = templates
    shown = {"prompt", *(name for row in rows for name in row.columns if name != columns[1])}
    check_placeholders("template", template, shown)
    used = placeholders(template) & shown
    if not used:
        raise ValueError(
            f"template must contain {{prompt}} or a column in braces ({', '.join(sorted(shown))}), got {template!r}"
        )
    in_answer = set()
    if demonstration is not None:
        columns_there = {name for row in rows for name in row.columns}
        check_placeholders("demonstration", demonstration, columns_there)
        in_answer = placeholders(demonstration) & columns_there
        if not in_answer:
            raise ValueError(f"demonstration must contain a column of {source.path} in braces, got {demonstration!r}")
    named = (used - {"prompt"}, in_answer)
    return tuple(_entry(row, f"{source.path}, line {row.line}", columns, templates, named) for row in rows)


def _entry(
    row: Row, where: str, columns: Columns, templates: Templates, named: tuple[set[str], set[str]]
) -> tuple[str, Problem]:
    """`named`: the columns that each template names."""
    prompt_column, reference_column = columns
    for column in (prompt_column, reference_column, *sorted(named[0] | named[1])):
        if column is not None and column not in row.columns:
            hint = " (reference_column=None: no references)" if column == reference_column else ""
            there = ", ".join(map(repr, row.columns)) or "none"
            raise ValueError(f"{where}: there is no column {column!r}; there are {there}{hint}")
    prompt = row.columns[prompt_column]
    if not isinstance(prompt, str) or not prompt.strip():
        wrong = "an empty one" if isinstance(prompt, str) else f"a {type(prompt).__name__}"
        raise ValueError(f"{where}: {prompt_column!r} must be a text, got {wrong}")
    question, demonstration = (
        None if text is None else fill(text, {"prompt": prompt} | {name: as_text(row.columns[name]) for name in names})
        for text, names in zip(templates, named, strict=True)
    )
    assert question is not None
    reference = None if reference_column is None else row.columns[reference_column]
    return prompt, Problem(question, reference, demonstration)


def as_text(value: Any) -> str:
    """A value as a template shows it: texts as they are, whole numbers without a fraction, the rest as JSON."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 145.0, as data sets write whole answers
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
