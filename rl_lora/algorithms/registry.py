"""Records of functions by name: those of this package, and those of a user's own modules, `module:name`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rl_lora.system.user_object import user_object


@dataclass(frozen=True)
class Record:
    """A function under a name. Its keyword-only parameters are its options, and have defaults."""

    function: Callable[..., Any]
    name: str = ""
    """By default the function's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.function.__name__)
        parameters = inspect.signature(self.function).parameters.values()
        if bare := [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]:
            raise ValueError(f"{self.name}: the option {bare[0]} needs a default")

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    @property
    def help(self) -> str:
        """The first paragraph of the function's docstring, in one line."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())

    @property
    def options(self) -> dict[str, Any]:
        """The defaults of the options."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


R = TypeVar("R", bound=Record)


class Registry(Generic[R]):
    """Records of one kind. `of_function` makes one of a bare function that a user names."""

    def __init__(self, kind: str, of_function: Callable[[Callable[..., Any]], R], *records: R):
        self.kind, self.of_function = kind, of_function
        self.records: dict[str, R] = {}
        self._own: dict[str, R] = {}
        for record in records:
            self.add(record)

    def add(self, record: R) -> R:
        """Take in a record. Raises ValueError if there is one of that name."""
        if record.name in self.records:
            raise ValueError(f"there is an {self.kind} named {record.name!r} already")
        self.records[record.name] = record
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __getitem__(self, name: str) -> R:
        """The record of that name, or of a user's own `module:name`: a record, or a function of which one is made.

        Raises:
            ValueError: there is none; names the nearest.
        """
        if name in self.records:
            return self.records[name]
        if ":" not in name:
            close = difflib.get_close_matches(name, self.records, n=1)
            meant = f"; {name} may be meant for {close[0]}" if close else ""
            there = f"there are {', '.join(self.records)}, and 'module:name' for one of your own"
            raise ValueError(f"no {self.kind} is named {name!r}{meant}; {there}")
        if name not in self._own:
            self._own[name] = self._imported(name)
        return self._own[name]

    def _imported(self, name: str) -> R:
        found = user_object(name, self.kind)
        kinds = tuple({type(record) for record in self.records.values()})
        if isinstance(found, kinds):
            return found
        if isinstance(found, Record):
            raise ValueError(f"{name} is no function and no {self.kind}, but {type(found).__name__}")
        return self.of_function(found)
