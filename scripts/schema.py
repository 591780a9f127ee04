"""The options that a config dataclass stands for: a field is an option, a field that is a dataclass a group of them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_origin, get_type_hints

from rl_lora.config import FROM_RUN, EvaluateConfig
from rl_lora.scripts.values import members
from rl_lora.settings.algorithm import registries
from rl_lora.settings.bounds import bounds_of
from rl_lora.settings.dotted import as_typed
from rl_lora.settings.from_run import without_run

OWN = {
    "help": "This help. --help all: every option. --help NAME: a group of options, or those with NAME in their names.",
    "version": "The version.",
    "config": "A YAML file with any of the options, in UTF-8. Of several files the later ones go over the earlier.",
    "print_config": "The configuration as YAML, all other options applied; nothing else is done.",
}
"""The options that every command has beside its config's."""
USUAL = {
    "lr": "learning_rate",
    "batch_size": "prompts_per_step",
    "num_generations": "group_size",
    "max_new_tokens": "max_tokens",
}
"""Names that options have elsewhere, and the last part of theirs here."""


@dataclass(frozen=True)
class Usage:
    """How a command is typed: the part of its help that the config does not hold."""

    words: str = ""
    """The words that start it, as in `rl-lora train`."""
    arguments: str = ""
    """The option whose values may be typed without its name, as in `rl-lora report runs/a`."""
    examples: tuple[str, ...] = ()
    """Calls of it, without the words that start it."""
    first: tuple[str, ...] = ()
    """The options that `--help` shows; by default all."""


@dataclass(frozen=True)
class Option:
    """One field of a config."""

    hint: Any
    """Its type, without the bounds."""
    default: Any
    bounds: str
    """In words: "at least 1"."""
    shown: str
    """The default as it is typed, or where it comes from."""


@dataclass(frozen=True)
class Schema:
    """All options of a config by their dotted names, and its groups with their docstrings."""

    options: dict[str, Option]
    groups: dict[str, str]

    def knows(self, name: str) -> bool:
        return name in self.options or name in self.groups or self.mapping_around(name) is not None

    def hint(self, name: str) -> Any:
        return self.options[name].hint if name in self.options else str

    def mapping_around(self, name: str) -> str | None:
        """The option that `env.kwargs.digits` is inside of."""
        parts = name.split(".")
        for n in range(1, len(parts)):
            outer = ".".join(parts[:n])
            if outer in self.options and self.takes_mapping(outer) and all(parts[n:]):
                return outer
        return None

    def takes_mapping(self, name: str) -> bool:
        return any((get_origin(kind) or kind) is dict for kind in members(self.options[name].hint))

    def unknown(self, arg: str) -> str:
        """A message about what was typed and is no option: what may be meant by it."""
        name = arg.partition("=")[0]
        if not arg.startswith("--"):
            bare = name.lstrip("-")
            dashes = f"; options have two dashes: --{bare}" if self.knows(bare) else ""
            return f"{arg!r} belongs to no option{dashes or '; a value with spaces in it is put in quotes'}"
        return f"there is no option {name}" + meant(name, [f"--{full}" for full in self.near(name[2:], OWN)])

    def near(self, name: str, others: Iterable[str] = ()) -> list[str]:
        """The option, or the one of the others, that is spelled or ends most like a name, if there is such a one."""
        name = name.replace("-", "_")
        last = name.rpartition(".")[2]
        ends = [full for full in self.options if full.rpartition(".")[2] == USUAL.get(last, last)]
        if len(ends) == 1:
            return ends
        spelled = {full.rpartition(".")[2]: full for full in reversed(self.options)}
        spelled |= {full: full for full in (*self.options, *others)}
        return [spelled[close] for close in nearest(name, spelled) or nearest(last, spelled)]


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The one of the names that is spelled most like this one, if there is such a one."""
    return difflib.get_close_matches(name, list(names), n=1)


def meant(name: str, close: list[str]) -> str:
    """The end of a message that says that there is no such name."""
    return f"; {name} may be meant for {close[0]}" if close else ""


def schema_of(config: Any) -> Schema:
    groups = {
        field.name: " ".join((type(value).__doc__ or "").split())
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
    }
    return Schema(dict(options_of(config)), groups)


def options_of(config: Any) -> Iterator[tuple[str, Option]]:
    """Dotted names of all fields that are no dataclasses themselves, with what is known of them."""
    without = without_run() if isinstance(config, EvaluateConfig) else {}
    for name, option in fields_of(config):
        if name in without and option.default is FROM_RUN:
            fallback = without[name]
            shown = f"the run's, or {as_typed(fallback)}" if fallback else "the run's"
            option = replace(option, hint=option.hint | None, shown=shown)
        yield name, option


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Option]]:
    """The same without what the runs of an evaluation decide. What a class adds to its base stands first; fields that
    name records are choices of their names, or any other text."""
    kind = type(config)
    hints, annotated = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for name, registry in registries(kind).items():
        hints[name] = Literal[tuple(registry)] | hints[name]
    declared = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    for field in sorted(dataclasses.fields(config), key=lambda field: declared.index(field.name)):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            bounds = bounds_of(annotated[field.name])
            yield name, Option(hints[field.name], value, bounds.words if bounds else "", as_typed(value))
