"""Rows of prompts and a reward function make an environment: files, data sets of the hub, or rows given in Python."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from rl_lora.envs.finite import FiniteEnv
from rl_lora.envs.jsonl import DataRow
from rl_lora.envs.records import read_records
from rl_lora.envs.split import check_fraction, check_split, split_of
from rl_lora.envs.templates import check_placeholders, fill, placeholders
from rl_lora.envs.text import Problem
from rl_lora.rewards import Judge, Messages, RewardSpec
from rl_lora.system.messages import shown_as_text

ANSWER = "answer"


class PromptsEnv(FiniteEnv):
    """`rl_lora/Prompts-v0`: the prompts of a data set, judged by any reward function.

    Args:
        path: the data: a .jsonl, .json, .csv, .tsv or .parquet file, also with .gz behind; a folder or the id of a data
            set on the Hugging Face hub, which `datasets` reads (`pip install 'rl_lora[data]'`); or, in Python, rows: a
            list of dicts, a `datasets.Dataset`. Read once a process, however many copies of the environment there are.
        reward: see `rewards.resolve`. Its functions may ask for any column by name: `rl_lora.rewards.signature`.
        prompt_column: where the prompt stands: a text, or messages, [{"role": "user", "content": ...}], of which the
            last one is the user's. It is also what the split goes by.
        reference_column: where the reference for the reward function stands, any JSON; "a.b" is b of the mapping in
            column a; None if there is none. "answer" may be missing where no reward function asks for the reference.
        template: the question, or the last message. {prompt} stands for the prompt, or that message, {name} for the
            column of that name, but never for the reference; all other braces stay as they are.
        demonstration: a reply that solves the problem, as a template like the question's, in which the reference may
            stand: "{equation} = {answer}". For `rl-lora sft`.
        split: "train" or "eval".
        eval_path: data of its own for "eval"; `path` is then "train" as a whole.
        eval_fraction: without `eval_path`, about this share of the prompts is held out, by a hash of their text:
            equal prompts are on the same side, and a row that is added moves no other.
        config_name: of a data set that has several configurations.
        data_split, eval_data_split: the data set's own split to read, of `path` and of `eval_path`; files have none.

    Raises:
        ValueError: an argument that cannot be, data that cannot be read or are malformed, a split without a problem, a
            reward function that wants a column that is not there.
    """

    def __init__(
        self,
        path: Any = "",
        reward: RewardSpec = "numeric",
        prompt_column: str = "prompt",
        reference_column: str | None = ANSWER,
        template: str = "{prompt}",
        demonstration: str | None = None,
        split: str = "train",
        eval_path: Any = None,
        eval_fraction: float = 0.1,
        config_name: str | None = None,
        data_split: str = "train",
        eval_data_split: str = "test",
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
        check_fraction(eval_fraction)
        sides = {"train": Rows(read_records(path, data_split, config_name))}
        sides["eval"] = sides["train"]
        if eval_path is not None:
            sides["eval"] = Rows(read_records(eval_path, eval_data_split, config_name))
        columns = _columns(sides["train"]) | _columns(sides["eval"])
        self.judge = Judge(self.reward, columns)
        signatures = self.judge.signatures
        if reference_column == ANSWER not in columns and not any(s.needs_reference for s in signatures):
            reference_column = None
        keep = (split, float(eval_fraction)) if eval_path is None else None
        wanted = frozenset(column for signature in signatures for column in signature.columns)
        templates = (template, demonstration)
        for rows in sides.values():
            _check_columns(rows, wanted)
        self.problems = _problems(sides[split], (prompt_column, reference_column), templates, keep)


Columns = tuple[str, str | None]
"""The names of the prompt column and of the reference column, if there is one."""
Templates = tuple[str, str | None]
"""The template of the question, and that of the demonstration, if there is one."""


class Rows:
    """The rows of a data set as the key of a cache: the same rows, not equal ones."""

    def __init__(self, rows: tuple[DataRow, ...]):
        self.rows = rows

    def __hash__(self) -> int:
        return id(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.rows is other.rows

    @property
    def name(self) -> str:
        """The name of the data in messages: the file, without the line."""
        return self.rows[0].place.rpartition(", ")[0]


@functools.lru_cache(maxsize=16)
def _columns(rows: Rows) -> frozenset[str]:
    """All columns that there are."""
    return frozenset(name for row in rows.rows for name in row.columns)


@functools.lru_cache(maxsize=16)
def _check_columns(rows: Rows, wanted: frozenset[str]) -> None:
    for row in rows.rows:
        if missing := wanted - row.columns.keys():
            raise ValueError(f"{_no_column(row, min(missing))}, which the reward function asks for")


@functools.lru_cache(maxsize=16)
def _problems(
    rows: Rows, columns: Columns, templates: Templates, keep: tuple[str, float] | None
) -> tuple[Problem, ...]:
    """The problems of a data set; with keep = (split, eval_fraction), those of one side."""
    entries = _entries(rows, columns, templates)
    if keep is None:
        return tuple(problem for _, problem in entries)
    split, fraction = keep
    problems = tuple(problem for prompt, problem in entries if split_of(prompt, fraction) == split)
    if not problems:
        raise ValueError(
            f"split {split!r} of {rows.name} is empty: with eval_fraction {fraction} none of its {len(entries)} "
            "problems is on this side; change eval_fraction, or give eval_path a file of its own"
        )
    return problems


@functools.lru_cache(maxsize=8)
def _entries(rows: Rows, columns: Columns, templates: Templates) -> tuple[tuple[str, Problem], ...]:
    """The prompt and the problem of each row; both splits share them."""
    template, demonstration = templates
    there = _columns(rows)
    shown = {"prompt", *there} - {columns[1]}
    check_placeholders("template", template, shown)
    used = placeholders(template) & shown
    if not used:
        raise ValueError(
            f"template must contain {{prompt}} or a column in braces ({', '.join(sorted(shown))}), got {template!r}"
        )
    in_answer = set()
    if demonstration is not None:
        check_placeholders("demonstration", demonstration, there)
        in_answer = placeholders(demonstration) & there
        if not in_answer:
            raise ValueError(f"demonstration must contain a column of {rows.name} in braces, got {demonstration!r}")
    named = (used - {"prompt"}, in_answer)
    return tuple(_entry(row, columns, templates, named) for row in rows.rows)


def _entry(
    row: DataRow, columns: Columns, templates: Templates, named: tuple[set[str], set[str]]
) -> tuple[str, Problem]:
    """`named`: the columns that each template names."""
    prompt_column, reference_column = columns
    for column in (prompt_column, *sorted(named[0] | named[1])):
        if column not in row.columns:
            raise ValueError(_no_column(row, column))
    reference = None if reference_column is None else _reference(row, reference_column)
    messages = _messages(row, prompt_column)
    asked = messages[-1]["content"]
    question, demonstration = (
        None if text is None else fill(text, {"prompt": asked} | {name: as_text(row.columns[name]) for name in names})
        for text, names in zip(templates, named, strict=True)
    )
    assert question is not None
    prompt = shown_as_text(messages)
    messages[-1]["content"] = question
    return prompt, Problem(
        shown_as_text(messages),
        reference,
        demonstration,
        messages=None if isinstance(row.columns[prompt_column], str) else messages,
        record=row.columns,
        place=row.place,
    )


def _no_column(row: DataRow, column: str) -> str:
    return f"{row.place}: there is no column {column!r}; there are {', '.join(map(repr, row.columns)) or 'none'}"


def _reference(row: DataRow, column: str) -> Any:
    if column in row.columns:
        return row.columns[column]
    value: Any = row.columns
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"{_no_column(row, column)} (reference_column=None: no references)")
        value = value[name]
    return value


def _messages(row: DataRow, column: str) -> Messages:
    """The prompt of a row as a conversation, a text as one message."""
    prompt = row.columns[column]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{row.place}: {column!r} must be a text, got an empty one")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple):
        raise ValueError(
            f"{row.place}: {column!r} must be a text, got a {type(prompt).__name__}; or messages, "
            '[{"role": "user", "content": ...}]'
        )
    messages = [{"role": _role(message), "content": _content(message)} for message in prompt]
    wrong = [message for message in messages if not message["role"] or not message["content"]]
    if wrong or not messages:
        raise ValueError(
            f'{row.place}: a message of {column!r} must be {{"role": ..., "content": a text}}, got {prompt!r:.200}'
        )
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{row.place}: the last message of {column!r} is the assistant's, so there is nothing to reply to"
        )
    return messages


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    return role if isinstance(role, str) else ""


def _content(message: Any) -> str:
    """The text of a message; of a list of parts, that of its texts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list | tuple) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def as_text(value: Any) -> str:
    """A value as a template shows it: texts as they are, whole numbers without a fraction, the rest as JSON."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 145.0, as data sets write whole answers
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
