"""What a reward function is called with, read off the names of its parameters.

Of one completion, by name: `completion`, `reference`, `prompt` (what was asked), `record` (the row of the data, a dict)
and any column of the data; `**kwargs` takes all columns that are not named. A first parameter of another name is the
completion, and a second one the reference: `(completion, reference)` by position.

A parameter `completions`, `prompts` or `completion_ids` makes it a batch function: it is called once for all replies to
a problem, everything it takes is a list, and it returns a list. TRL's reward functions are of this form.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_lora.rewards.score import Case, Messages, Reply, RewardError, RewardFunction

ONE = ("completion", "reference", "prompt", "record")
BATCH = ("completions", "prompts", "completion_ids")
LOGS = ("log_metric", "log_extra")
"""What TRL lends a batch function to report with."""


@dataclass(frozen=True)
class Signature:
    """How a function is called: what it takes by position, what by keyword (parameter -> what it is given), and whether
    it takes the other columns too. `columns` are those that it cannot do without."""

    name: str
    batch: bool = False
    positions: tuple[str, ...] = ONE[:2]
    keywords: Mapping[str, str] = field(default_factory=dict)
    rest: bool = False
    columns: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()

    @property
    def needs_reference(self) -> bool:
        return "reference" in self._taken

    @property
    def needs_record(self) -> bool:
        """Whether it reads more of the data than the reference."""
        return self.rest or bool(self._taken - {"completion", "reference", "prompt", *BATCH, *LOGS})

    @property
    def _taken(self) -> set[str]:
        return {*self.positions, *self.keywords.values()}

    def call(self, function: RewardFunction, case: Case, replies: Sequence[Reply], logs: Mapping[str, Any]) -> Any:
        """Call the function on replies to one problem; on one reply, unless it is a batch function."""
        record = copy.deepcopy(dict(case.record)) if self.needs_record else {}
        prompt = case.prompt if isinstance(case.prompt, str) else copy.deepcopy(case.prompt)
        values = {**record, "reference": case.reference, "prompt": prompt, "record": record}
        left = record.keys() - {"completion", "prompt"}
        if self.batch:
            values = {name: [copy.deepcopy(value) for _ in replies] for name, value in values.items()}
            values |= {"prompts": values["prompt"], **logs}
            values["completions"] = [completion_of(case.prompt, reply.text) for reply in replies]
            if all(reply.token_ids is not None for reply in replies):
                values["completion_ids"] = [list(reply.token_ids or ()) for reply in replies]
            left |= {*BATCH, *LOGS}
        else:
            values["completion"] = replies[0].text
            left |= {"completion", *(record.keys() & {"prompt"})}
        missing = [source for source in self.positions if source not in values]
        if missing:
            raise RewardError(f"the reward function {self.name} wants {missing[0]!r}, which is not known here")
        keywords = {parameter: values[source] for parameter, source in self.keywords.items() if source in values}
        if self.rest:
            keywords |= {name: values[name] for name in left - self._taken - self.options if name in values}
        return function(*(values[source] for source in self.positions), **keywords)


def completion_of(prompt: str | Messages, text: str) -> str | Messages:
    """A completion as a batch function gets it: a text, or a conversation's next message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def read(function: RewardFunction, name: str, columns: Collection[str] | None) -> Signature:
    """How `function` is called, where the data have these columns (None: not known yet, any name may be one).

    Raises:
        ValueError: it wants what there is not; the message names the columns.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some C functions have none
        return Signature(name)
    options = _options(function)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in options]
    names = {p.name for p in named}
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    batch = bool(names & set(BATCH))
    if not batch and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return Signature(name)  # (*args, **kwargs): a wrapper that hands on what it gets
    if batch and "completion" in names:
        raise ValueError(f"reward {name!r} takes one completion and a batch of them: {', '.join(sorted(names))}")
    if not named and not rest:
        raise ValueError(f"reward {name!r} cannot be called with (completion, reference): it has no parameters")
    by_place = {} if batch else _by_place(named, name, columns)
    ours = {*ONE, *BATCH, *LOGS} - {"completion"} if batch else {*ONE}
    positions: list[str] = []
    keywords: dict[str, str] = {}
    needed: set[str] = set()
    for parameter in named:
        source = by_place.get(parameter.name, parameter.name)
        required = parameter.default is parameter.empty
        if source not in ours and columns is not None and source not in columns:
            if required:
                raise ValueError(_unknown(name, parameter.name, columns))
            continue
        if source not in ours and required:
            needed.add(source)
        always = required or source in (*ONE, "completions", "prompts")
        if parameter.kind is not parameter.KEYWORD_ONLY and always and not keywords:
            positions.append(source)
        else:
            keywords[parameter.name] = source
    return Signature(name, batch, tuple(positions), keywords, rest, frozenset(needed), frozenset(options))


def _by_place(named: Sequence[inspect.Parameter], name: str, columns: Collection[str] | None) -> dict[str, str]:
    """The first parameter is the completion, whatever its name, unless another one is; the second one the reference,
    unless it has a name that means something."""
    places = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    if not places or "completion" in {p.name for p in named[1:]}:
        return {}
    first = places[0]
    if first in ("reference", "prompt", "record"):
        raise ValueError(f"reward {name!r} begins with {first!r}: call the parameter that takes the reply 'completion'")
    found = {first: "completion"}
    required = [p.name for p in named if p.default is p.empty]
    if len(places) > 1 and set(required) <= {*places[:2]} and "reference" not in {p.name for p in named}:
        second = places[1]
        if second not in ONE and second not in (columns or ()):
            found[second] = "reference"
            if near := difflib.get_close_matches(second, columns or (), 1, cutoff=0.75):
                warnings.warn(
                    f"reward {name!r}: the data have no column {second!r}, so that parameter gets the reference; if "
                    f"the column {near[0]!r} is meant, call it that",
                    stacklevel=2,
                )
    return found


def _unknown(name: str, parameter: str, columns: Collection[str] | None) -> str:
    there = ", ".join(map(repr, sorted(columns or ()))) or "none"
    return (
        f"reward {name!r} has a parameter {parameter!r}, and the data have no such column; there are {there}; beside "
        f"columns it can take {', '.join(ONE)}, or in a batch {', '.join(BATCH)}"
    )


def _options(function: RewardFunction) -> set[str]:
    """Keyword arguments that are given already."""
    if isinstance(function, functools.partial):
        return {*function.keywords, *_options(function.func)}
    return set()
