"""What every command does around its work: parse a config dataclass, and end with a clear message and exit code."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeVar, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings
from rich.console import Console
from rich.text import Text

from rl_lora.files import FileError
from rl_lora.run_folder import is_first_process
from scripts import signals

Config = TypeVar("Config")
USER_ERROR, FAILURE = 2, 1
COMMAS = re.compile(r"\d+(,\d+)*")
LIBRARIES = {"accelerate", "numpy", "tokenizers", "torch", "transformers"}


def parse(config_type: type[Config], args: Sequence[str] | None = None) -> Config:
    """Command line, over --config FILE (YAML), over the defaults of a config dataclass; --print_config shows all."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    hints = get_type_hints(config_type)
    set_loader("yaml in braces", partial(_load, options={*hints, "config"}), (yaml.YAMLError,))
    parser = ArgumentParser(
        description=config_type.__doc__,
        default_env=False,
        allow_abbrev=False,
        exit_on_error=False,
        parser_mode="yaml in braces",
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below.")
    lists = {name for name, hint in hints.items() if hint == list[str]}  # --adapters runs/*: as the shell expands it
    parser.add_class_arguments(config_type, nested_key=None, skip=lists)
    for param in parse_from_object(config_type).params:
        if param.arg_name in lists:
            parser.add_argument(f"--{param.arg_name}", nargs="*", type=str, default=[], help=param.description)
    for name in (name for name, hint in hints.items() if hint is bool):  # --resume alone is --resume true
        action = parser._option_string_actions[f"--{name}"]
        action.nargs, action.const = "?", True
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # -1e-3 is a value, no option
    numbers = {f"--{name}" for name, hint in hints.items() if hint == list[int]}
    given = _bracketed(sys.argv[1:] if args is None else args, numbers)
    try:
        parsed: Any = parser.instantiate(parser.parse_args(given))
    except ArgumentError as error:
        raise ValueError(f"{error}{_meant(given, parser._option_string_actions)}") from None
    del parsed.config
    return config_type(**vars(parsed))


def _meant(args: Sequence[str], options: Collection[str]) -> str:
    """What to try, where an option is not one of these; inside a mapping, as in --env.kwargs.x, any name will do."""
    hints = []
    for name in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        inside = any(name.startswith(f"{option}.") for option in options if "." in option)
        if name not in options and not inside and (close := difflib.get_close_matches(name, options, n=1)):
            hints.append(f"; {name} may be meant for {close[0]}")
    return "".join([*hints, "; --help shows all options"])


def _load(text: str, options: set[str]) -> Any:
    """A value as YAML has it, but a text such as "Question: {question}" or "- {answer}" stays a text: mappings stand in
    braces and lists in brackets, unless this is a whole config file."""
    value = get_loader("yaml")(text)
    enclosed = text.lstrip().startswith(("{", "["))
    if not enclosed and (isinstance(value, list) or (isinstance(value, dict) and options.isdisjoint(value))):
        return text
    return value


def _bracketed(args: Sequence[str], options: set[str]) -> list[str]:
    """--k 1,4,16 as the list [1,4,16] that the parser takes."""
    result: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and name in options and COMMAS.fullmatch(value):
            arg = f"{name}=[{value}]"
        elif result and result[-1] in options and COMMAS.fullmatch(arg):
            arg = f"[{arg}]"
        result.append(arg)
    return result


def run(work: Callable[[], object], when_interrupted: str = "") -> int:
    """Do the work; what users can mend is a line on standard error and exit code 2, anything else a traceback and 1."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        work()
    except (ValueError, FloatingPointError) as error:
        if raised_by(error) in LIBRARIES:
            raise  # not a message of ours: the traceback is what helps
        console.print("[bold red]error:[/]", Text(str(error)))  # as it is: brackets in it are no markup
        return USER_ERROR if isinstance(error, ValueError) else FAILURE
    except FileError as error:
        console.print("[bold red]error:[/]", Text(str(error)))
        return FAILURE
    except KeyboardInterrupt as error:
        if is_first_process():
            console.print(f"interrupted{when_interrupted}", markup=False)
        return signals.ended_by(error)
    return 0


def raised_by(error: BaseException) -> str:
    """The top-level package whose line raised it."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] if traceback else ""


def main(config_type: type[Config], work: Callable[[Config], object], when_interrupted: str = "") -> None:
    """A command: parse, work, exit."""
    signals.listen()
    sys.path.append(os.getcwd())  # environments and rewards of the user's own, also for the installed commands
    sys.exit(run(lambda: work(parse(config_type)), when_interrupted))
