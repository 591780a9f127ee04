"""From a config dataclass to a command line, and back: options, --config FILE, --print_config, --help, --version.

A field is an option; the docstring under it is its help. Options go over files, files over the dataclass's defaults.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

import rl_lora
from rl_lora.config import as_typed
from rl_lora.scripts.values import (
    described,
    explained,
    from_node,
    from_text,
    from_texts,
    from_untyped,
    is_list,
    members,
)
from rl_lora.system.plain_yaml import Loader, dump, items
from rl_lora.system.terminal import Terminal, in_line

Config = TypeVar("Config")
OWN = {
    "help": "Show this help and exit.",
    "version": "Show the version and exit.",
    "config": "A YAML file with any of the options below, in UTF-8; several: the later ones go over the earlier.",
    "print_config": "Print the configuration as YAML, all other options applied, and exit.",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """The type and the default of one field of a config."""

    hint: Any
    default: Any


def parse(config_type: type[Config], args: Sequence[str] | None = None) -> Config:
    """A config from the command line. Raises ValueError that says what is wrong; SystemExit where all is done."""
    default = config_type()
    options, groups = dict(options_of(default)), dict(groups_of(default))
    given = list(split(sys.argv[1:] if args is None else args, options, groups))
    names = {name for name, _ in given}
    if "help" in names:
        print(help_of(default, options, groups), end="")
        raise SystemExit(0)
    if "version" in names:
        print(f"rl_lora {rl_lora.__version__}")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for name, texts in given:
        if name == "config":
            values |= from_file(texts[0], options, groups)
    for name, texts in given:
        if name not in OWN:
            take(name, texts, values, options, groups)
    config = built(default, values)
    if "print_config" in names:
        print(dump(dataclasses.asdict(config)), end="")
        raise SystemExit(0)
    return config


def options_of(default: Any, prefix: str = "") -> Iterator[tuple[str, Option]]:
    """Dotted names of all fields that are no dataclasses themselves."""
    hints = get_type_hints(type(default))
    for field in dataclasses.fields(default):
        value, name = getattr(default, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from options_of(value, f"{name}.")
        else:
            yield name, Option(hints[field.name], value)


def groups_of(default: Any) -> Iterator[tuple[str, str]]:
    """The fields that are dataclasses, with their docstrings."""
    for field in dataclasses.fields(default):
        if dataclasses.is_dataclass(value := getattr(default, field.name)):
            yield field.name, " ".join((type(value).__doc__ or "").split())


def helps_of(default: Any, prefix: str = "") -> dict[str, str]:
    """The docstrings of all fields by dotted names, inherited ones too."""
    found: dict[str, str] = {}
    for kind in reversed(type(default).__mro__):
        if dataclasses.is_dataclass(kind):
            params = parse_from_object(kind).params
            found |= {prefix + p.arg_name: " ".join(p.description.split()) for p in params if p.description}
    for field in dataclasses.fields(default):
        if dataclasses.is_dataclass(value := getattr(default, field.name)):
            found |= helps_of(value, f"{prefix}{field.name}.")
    return found


def split(args: Sequence[str], options: dict[str, Option], groups: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Names of options, without their dashes, and the texts behind them. Raises ValueError for what is no option."""
    rest, wrong = list(args), []
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = {"-h": "help"}.get(arg, name)
        if not arg.startswith("-") or (name not in OWN and not known(name, options, groups)):
            wrong.append(arg)
            while arg.startswith("--") and not equals and rest and not looks_like_option(rest[0]):
                rest.pop(0)  # what belongs to an option that is none
            continue
        if equals:
            yield name, [value] if value or not is_list(hint_of(name, options)) else []
            continue
        if name in ("help", "version", "print_config"):
            yield name, []
            continue
        most = 10**9 if is_list(hint_of(name, options)) else 1
        texts: list[str] = []
        while rest and len(texts) < most and not looks_like_option(rest[0]):
            texts.append(rest.pop(0))
        if not texts and most == 1:
            if bool not in members(hint_of(name, options)):
                raise ValueError(f"--{name} needs a value; one that begins with -- is written --{name}=...")
            texts = ["true"]  # --resume alone
        yield name, texts
    if wrong:
        raise ValueError("; ".join(unknown(arg, options, groups) for arg in wrong) + "; --help shows all options")


def looks_like_option(arg: str) -> bool:
    name = arg.removeprefix("--").partition("=")[0]
    return arg == "-h" or (arg.startswith("--") and name.replace(".", "").replace("-", "").replace("_", "").isalnum())


def known(name: str, options: dict[str, Option], groups: dict[str, str]) -> bool:
    return name in options or name in groups or mapping_around(name, options) is not None


def mapping_around(name: str, options: dict[str, Option]) -> str | None:
    """The option that `env.kwargs.digits` is inside of."""
    parts = name.split(".")
    for n in range(1, len(parts)):
        outer = ".".join(parts[:n])
        if outer in options and takes_mapping(options[outer]) and all(parts[n:]):
            return outer
    return None


def takes_mapping(option: Option) -> bool:
    return any((get_origin(kind) or kind) is dict for kind in members(option.hint))


def hint_of(name: str, options: dict[str, Option]) -> Any:
    return options[name].hint if name in options else str


def unknown(arg: str, options: dict[str, Option], groups: dict[str, str]) -> str:
    """What to try instead of what is no option."""
    name = arg.partition("=")[0]
    if not arg.startswith("--"):
        dashes = f"; options have two dashes: --{name.lstrip('-')}" if known(name.lstrip("-"), options, groups) else ""
        return f"{arg!r} belongs to no option{dashes or '; a value with spaces in it is put in quotes'}"
    names = [f"--{name}" for name in (*options, *groups, *OWN)]
    spelled = name.replace("-", "_").replace("__", "--", 1)
    short = [full for full in names if full.rpartition(".")[2] == name.lstrip("-")]
    close = difflib.get_close_matches(spelled, names, n=1) or (short if len(short) == 1 else [])
    return f"there is no option {name}" + (f"; {name} may be meant for {close[0]}" if close else "")


def take(
    name: str, texts: list[str], values: dict[str, Any], options: dict[str, Option], groups: dict[str, str]
) -> None:
    """Put what was typed behind one option into the values. Raises ValueError that names it."""
    if name in groups and name not in options:
        (text,) = texts
        if text.lstrip().startswith("{"):
            with_names(from_flow(text, name), f"{name}.", values, options, groups)
        else:
            values |= from_file(text, options, groups, f"{name}.")
        return
    try:
        if name in options:
            option = options[name]
            read = (
                from_texts(texts, option.hint, "." in name)
                if is_list(option.hint)
                else from_text(texts[0], option.hint)
            )
            values[name] = read
            return
        outer = mapping_around(name, options)
        assert outer is not None
        inside = values[outer] = copy.deepcopy(values.get(outer, options[outer].default) or {})
        *between, last = name.removeprefix(f"{outer}.").split(".")
        for part in between:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"cannot be set: {part} is {as_typed(inside)}, no mapping")
        inside[last] = from_untyped(texts[0])
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def from_flow(text: str, name: str) -> yaml.MappingNode:
    """The mapping in braces behind a group of options."""
    try:
        from_text(text, dict[str, Any])  # nothing in it is lost
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    node = yaml.compose(text, Loader)
    assert isinstance(node, yaml.MappingNode)
    return node


def from_file(file: str, options: dict[str, Option], groups: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Values of the options that a YAML file sets. Raises ValueError that names the file, and the line where it can."""
    path = Path(file).expanduser()
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise ValueError(f"cannot read config file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"config file {file} is not UTF-8: byte {error.object[error.start]:#x} at {error.start}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not YAML: {explained(error)}") from None
    values: dict[str, Any] = {}
    if node is None:
        return values
    for line, comment in comments_for_values(node):
        note = f"{file}, line {line}: the value is empty: {comment!r} is a comment in YAML"
        Terminal(stderr=True).print(in_line(note))
    try:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("it must hold options such as `steps: 20`")
        with_names(node, prefix, values, options, groups)
    except ValueError as error:
        raise ValueError(f"config file {file}: {error}") from None
    return values


def comments_for_values(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Lines such as `template: #### {answer}`, and what of them YAML leaves out."""
    for child in node.value if isinstance(node, yaml.SequenceNode) else []:
        yield from comments_for_values(child)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        rest = key.end_mark.buffer[key.end_mark.pointer :].rstrip("\0").partition("\n")[0].partition(":")[2].strip()
        if isinstance(value, yaml.ScalarNode) and value.style is None and not value.value and rest.startswith("#"):
            yield key.start_mark.line + 1, rest
        yield from comments_for_values(value)


def with_names(
    node: yaml.MappingNode, prefix: str, values: dict[str, Any], options: dict[str, Option], groups: dict[str, str]
) -> None:
    """The options that a mapping names, those of groups in mappings of their own."""
    for key, value in items(node):
        name, line = f"{prefix}{getattr(key, 'value', '')}", f"line {key.start_mark.line + 1}: "
        try:
            if name in options:
                values[name] = from_node(value, options[name].hint)
            elif name in groups:
                if isinstance(value, yaml.MappingNode):
                    with_names(value, f"{name}.", values, options, groups)
                elif value.value:
                    raise ValueError("must be a mapping")
            else:
                raise LookupError(unknown(f"--{name}", options, groups).replace("--", ""))
        except LookupError as error:
            raise ValueError(f"{line}{error}") from None
        except ValueError as error:
            named = str(error) if str(error).startswith("line ") else f"{line}{name} {error}"
            raise ValueError(named) from None


def built(default: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """The default with some of its fields, and of its dataclasses' fields, replaced."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        name, value = prefix + field.name, getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = built(value, values, f"{name}.")
        elif name in values:
            changes[field.name] = values[name]
    return dataclasses.replace(default, **changes)


def help_of(default: Any, options: dict[str, Option], groups: dict[str, str]) -> str:
    """All options with their docstrings and defaults."""
    parser = argparse.ArgumentParser(
        description=" ".join((type(default).__doc__ or "").split()),
        usage="%(prog)s [--option VALUE ...] [--config FILE]",
        add_help=False,
        epilog="A text is taken as it is typed. Inside of a mapping, numbers, true, false, null, [lists] and "
        "{mappings} are what YAML takes them for; in quotes ('\"null\"') they are texts.",
    )
    own = parser.add_argument_group("about this command")
    for name, text in OWN.items():
        flags = ["-h", "--help"] if name == "help" else [f"--{name}"]
        if name == "config":
            own.add_argument("--config", help=text, metavar="FILE")
        else:
            own.add_argument(*flags, help=text, action="store_true")
    sections = {"": parser.add_argument_group("options")}
    for name, text in groups.items():
        sections[name] = parser.add_argument_group(f"{name}.*", text.replace("%", "%%"))
    helps = helps_of(default)
    for name, option in options.items():
        text = f"{helps.get(name, '')} (default: {as_typed(option.default)})".replace("%", "%%")
        many = is_list(option.hint)
        section = sections.get(name.rpartition(".")[0].partition(".")[0], sections[""])
        section.add_argument(f"--{name}", metavar=metavar(option.hint), nargs="*" if many else None, help=text)
    return parser.format_help()


def metavar(hint: Any) -> str:
    """What stands behind an option in its help."""
    words = {"a text": "TEXT", "a number": "NUMBER", "a whole number": "N", "true or false": "true|false"}
    kinds = [words.get(described(kind), described(kind)) for kind in members(hint)]
    kinds = [kind.removeprefix("one of ").replace(", ", "|") if kind.startswith("one of ") else kind for kind in kinds]
    return "|".join("ITEM" if k.startswith("a list") else "{...}" if k.startswith("a mapping") else k for k in kinds)
