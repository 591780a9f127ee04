"""A config dataclass from a command line: options, --config FILE, --print_config, --help, --version.

Options go over files, files over the dataclass's defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

import rl_lora
from rl_lora.scripts.help import help_page
from rl_lora.scripts.schema import OWN, Schema, Usage, meant, schema_of
from rl_lora.scripts.values import enclosed, explained, from_node, from_text, from_texts, from_untyped, is_list, members
from rl_lora.settings.dotted import as_typed
from rl_lora.system.plain_yaml import Loader, dump, items
from rl_lora.system.terminal import Terminal, in_line

Config = TypeVar("Config")


def parse(config_type: type[Config], args: Sequence[str] | None = None, usage: Usage | None = None) -> Config:
    """A config from the command line. Raises ValueError that says what is wrong; SystemExit where all is done."""
    usage, default = usage or Usage(f"python {sys.argv[0]}"), config_type()
    schema = schema_of(default)
    given = list(split(sys.argv[1:] if args is None else args, schema, usage.arguments))
    names = dict(given)
    if usage.arguments and [name for name, _ in given].count(usage.arguments) > 1:
        raise ValueError(f"--{usage.arguments} names folders twice: name all of them in one place")
    if "help" in names:
        print(help_page(default, schema, usage, *names["help"]), end="")
        raise SystemExit(0)
    if "version" in names:
        print(f"rl_lora {rl_lora.__version__}")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for name, texts in given:
        if name == "config":
            values |= from_file(texts[0], schema)
    for name, texts in given:
        if name not in OWN:
            take(name, texts, values, schema)
    config = built(default, values)
    if "print_config" in names:
        print(dump(dataclasses.asdict(config)), end="")
        raise SystemExit(0)
    return config


def split(args: Sequence[str], schema: Schema, arguments: str = "") -> Iterator[tuple[str, list[str]]]:
    """Names of options, without their dashes, and the texts behind them; texts behind none are those of `arguments`.

    Raises:
        ValueError: something is no option, or has no value.
    """
    rest, bare, wrong = list(args), [], []
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = {"-h": "help"}.get(arg, name)
        if arguments and not arg.startswith("-"):
            bare.append(arg)
        elif not arg.startswith("-") or (name not in OWN and not schema.knows(name)):
            wrong.append(arg)
            while arg.startswith("--") and not equals and rest and not looks_like_option(rest[0]):
                rest.pop(0)  # what belongs to an option that is none
        elif equals:
            yield name, [value] if value or not is_list(schema.hint(name)) else []
        elif name in ("version", "print_config"):
            yield name, []
        else:
            yield name, values_of(name, rest, schema)
    if wrong:
        raise ValueError("; ".join(map(schema.unknown, wrong)) + "; --help all shows all options")
    if bare:
        yield arguments, bare


def values_of(name: str, rest: list[str], schema: Schema) -> list[str]:
    """Takes the texts that belong to an option from what stands behind it. Raises ValueError where it needs one."""
    hint = schema.hint(name)
    most = len(rest) if is_list(hint) else 1
    texts: list[str] = []
    while rest and len(texts) < most and not looks_like_option(rest[0]):
        texts.append(rest.pop(0))
    if texts or is_list(hint) or name == "help":
        return texts
    if bool in members(hint):
        return ["true"]  # --resume alone
    raise ValueError(f"--{name} needs a value; one that begins with -- is written --{name}=...")


def looks_like_option(arg: str) -> bool:
    name = arg.removeprefix("--").partition("=")[0]
    return arg == "-h" or (arg.startswith("--") and name.replace(".", "").replace("-", "").replace("_", "").isalnum())


def take(name: str, texts: list[str], values: dict[str, Any], schema: Schema) -> None:
    """Put what was typed behind one option into the values. Raises ValueError that names it."""
    node = None
    if name in schema.groups and not texts[0].lstrip().startswith("{"):
        values |= from_file(texts[0], schema, f"{name}.")
        return
    try:
        if name in schema.groups:
            node = enclosed(texts[0], "{", must=True)
        elif name not in schema.options:
            put_inside(name, texts[0], values, schema)
        elif is_list(hint := schema.hint(name)):
            values[name] = from_texts(texts, hint, "." in name)
        else:
            values[name] = from_text(texts[0], hint)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if isinstance(node, yaml.MappingNode):
        with_names(node, f"{name}.", values, schema)


def put_inside(name: str, text: str, values: dict[str, Any], schema: Schema) -> None:
    """One value of an option that takes a mapping: `env.kwargs.digits`."""
    outer = schema.mapping_around(name)
    assert outer is not None
    inside = values[outer] = copy.deepcopy(values.get(outer, schema.options[outer].default) or {})
    *between, last = name.removeprefix(f"{outer}.").split(".")
    for part in between:
        inside = inside.setdefault(part, {})
        if not isinstance(inside, dict):
            raise ValueError(f"cannot be set: {part} is {as_typed(inside)}, no mapping")
    inside[last] = from_untyped(text)


def from_file(file: str, schema: Schema, prefix: str = "") -> dict[str, Any]:
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
        with_names(node, prefix, values, schema)
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


def with_names(node: yaml.MappingNode, prefix: str, values: dict[str, Any], schema: Schema) -> None:
    """The options that a mapping names, those of groups in mappings of their own."""
    for key, value in items(node):
        name, line = f"{prefix}{getattr(key, 'value', '')}", f"line {key.start_mark.line + 1}: "
        try:
            if name in schema.options:
                values[name] = from_node(value, schema.hint(name))
            elif name in schema.groups:
                if isinstance(value, yaml.MappingNode):
                    with_names(value, f"{name}.", values, schema)
                elif value.value:
                    raise ValueError("must be a mapping")
            else:
                raise LookupError(f"there is no option {name}{meant(name, schema.near(name, schema.groups))}")
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
