"""The help of a command: the options used most, all of them, or those that a word names.

The text of an option is the docstring under its field, shortened where only some options are shown.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args, get_origin

from docstring_parser import parse_from_object

from rl_lora.scripts.schema import OWN, Schema, Usage, meant, nearest
from rl_lora.scripts.values import NONE, is_list, members
from rl_lora.settings.algorithm import registries

VALUES = (
    "A text is taken as it is typed. Inside of a mapping, numbers, true, false, null, [lists] and {mappings} are what "
    "YAML takes them for; in quotes ('\"null\"') they are texts."
)
COLUMN = 26
"""Where the texts of options begin."""


def help_page(config: Any, schema: Schema, usage: Usage, topic: str = "") -> str:
    """What `--help`, `--help all`, `--help GROUP` and `--help WORD` print. Raises ValueError for a word in no name."""
    texts = texts_of(config)
    if topic and topic != "all":
        return "\n".join(listed(schema, texts, named_by(topic, schema)))
    is_short = bool(usage.first) and not topic
    lines = [
        f"usage: {usage.words}{f' [{usage.arguments.upper()} ...]' if usage.arguments else ''} [--OPTION VALUE ...]",
        "",
        *paragraph(type(config).__doc__ or ""),
        "",
    ]
    if usage.examples:
        lines += ["examples:", *(line for example in usage.examples for line in typed(f"{usage.words} {example}")), ""]
    if is_short:
        lines += [
            "options used most:",
            *(line for name in usage.first for line in entry(schema, texts, name, True)),
            "",
        ]
    else:
        lines += listed(schema, texts, schema.options)
    lines.append("about this command:")
    for name, text in OWN.items():
        lines += columns({"help": "-h, --help [NAME]", "config": "--config FILE"}.get(name, f"--{name}"), text)
    if is_short:
        lines += ["", *paragraph(more(schema, usage))]
    elif any(map(schema.takes_mapping, schema.options)):
        lines += ["", *paragraph(VALUES)]
    return "\n".join(lines) + "\n"


def more(schema: Schema, usage: Usage) -> str:
    return (
        f"These are {len(usage.first)} of {len(schema.options)} options. `{usage.words} --help all` shows all, and "
        f"`--help NAME` those of a group: {', '.join(schema.groups)}."
    )


def named_by(topic: str, schema: Schema) -> list[str]:
    """The options of a group, or else those that have a word in their names."""
    word = topic.removeprefix("--")
    found = [name for name in schema.options if name.startswith(f"{word}.")]
    found = found or [name for name in schema.options if word in name]
    if not found:
        close = nearest(word, [*schema.groups, *schema.options, *(n.rpartition(".")[2] for n in schema.options), "all"])
        raise ValueError(f"no option has {word!r} in its name{meant(word, close)}; --help all shows all options")
    return found


def listed(schema: Schema, texts: dict[str, str], names: Collection[str]) -> Iterator[str]:
    """Options under the headings of their groups."""
    for group in ("", *schema.groups):
        of_group = [name for name in names if name.rpartition(".")[0].partition(".")[0] == group]
        if of_group:
            yield f"{group}.*: {schema.groups[group]}" if group else "options:"
            for name in of_group:
                yield from entry(schema, texts, name)
            yield ""


def entry(schema: Schema, texts: dict[str, str], name: str, is_short: bool = False) -> list[str]:
    """An option, its kind of value, its text, its bounds and its default."""
    text, option = texts.get(name, ""), schema.options[name]
    if is_short:
        text = shortened(text)
    told = [option.bounds] if option.bounds else []
    if option.shown not in ("null", "[]") or "y default" not in texts.get(name, ""):  # else the text says it
        told.append(f"default: {option.shown}")
    text += f" ({'; '.join(told)})" if told else ""
    return columns(f"--{name} {metavar(option.hint)}", text)


def shortened(text: str) -> str:
    """The first sentence of a docstring, and the one that tells the default."""
    first, *others = re.split(r"(?<=\.)\s(?=[A-Z])", text)
    return " ".join([first, *(sentence for sentence in others if sentence.startswith("By default"))])


def columns(head: str, text: str) -> list[str]:
    """A name in the left column and its text in the right one."""
    body = paragraph(text, COLUMN)
    return [f"  {head:<{COLUMN - 2}}{body[0].lstrip()}", *body[1:]] if len(head) < COLUMN - 2 else [f"  {head}", *body]


def typed(command: str) -> list[str]:
    """A command in lines that can be pasted."""
    lines = textwrap.wrap(
        command, width() - 4, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False
    )
    return [f"  {line} \\" for line in lines[:-1]] + [f"  {lines[-1]}"]


def width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def paragraph(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width(), initial_indent=" " * indent, subsequent_indent=" " * indent)


def metavar(hint: Any) -> str:
    """The kind of value that an option takes, as it stands behind its name."""
    kinds = [word(kind) for kind in members(hint)]
    if is_list(hint):
        return kinds[0].replace(",", "")  # typed side by side
    return f"[{'|'.join(kinds)}]" if bool in members(hint) else "|".join(kinds)


def word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"[{word(get_args(kind)[0])}, ...]"
    return {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT", NONE: "null"}.get(kind, "{...}")


def texts_of(config: Any, prefix: str = "") -> dict[str, str]:
    """The docstrings of all fields by dotted names, inherited ones too, with a line of each record that one names."""
    found: dict[str, str] = {}
    for kind in reversed(type(config).__mro__):
        if dataclasses.is_dataclass(kind):
            params = parse_from_object(kind).params
            found |= {prefix + p.arg_name: " ".join(p.description.split()) for p in params if p.description}
    for name, registry in registries(type(config)).items():
        records = (f"{record.name}: {record.help}" for record in registry.records.values())
        found[prefix + name] = " ".join([found[prefix + name], *records])
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            found |= texts_of(value, f"{prefix}{field.name}.")
    return found
