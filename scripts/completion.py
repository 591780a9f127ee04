"""Tab completion of `rl-lora`: subcommands, options, their choices, and paths. The shell asks the command at each tab.

Built on argcomplete, which speaks to bash, zsh and fish.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import FilesCompleter

from rl_lora.scripts.help import shortened, texts_of
from rl_lora.scripts.schema import OWN, Usage, meant, nearest, schema_of
from rl_lora.scripts.values import NONE, is_list, members
from rl_lora.system.invocation import COMMAND

INSTALL = {
    "bash": f'eval "$({COMMAND} completion bash)"     in ~/.bashrc',
    "zsh": f'eval "$({COMMAND} completion zsh)"      in ~/.zshrc, behind compinit',
    "fish": f"{COMMAND} completion fish | source      in ~/.config/fish/config.fish",
}


def script_for(args: list[str]) -> str:
    """The script that a shell reads once, or where to put it. Raises ValueError for what is no shell."""
    if not args or args[0] in ("-h", "--help"):
        return "\n".join([f"usage: {COMMAND} completion {'|'.join(INSTALL)}", "", *INSTALL.values()])
    if args[0] not in INSTALL:
        close = nearest(args[0], INSTALL)
        raise ValueError(
            f"there is no completion for {args[0]}{meant(args[0], close)}; there is for {', '.join(INSTALL)}"
        )
    return str(argcomplete.shellcode([COMMAND], shell=args[0]))


def complete(commands: dict[str, tuple[str, type[Any], Usage]]) -> None:
    """Answer the shell that has set `COMP_LINE`, and exit. Commands by name: summary, config, usage."""
    parser = argparse.ArgumentParser(COMMAND)
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()[1:2]
    for name, (summary, config_type, usage) in commands.items():
        subparser = subparsers.add_parser(name, help=summary, add_help=False)
        if typed == [name]:
            add_options(subparser, config_type(), usage)
    shells = subparsers.add_parser("completion", help="Print the tab completion of a shell.")
    shells.add_argument("shell", choices=[*INSTALL])
    argcomplete.autocomplete(parser, always_complete_options="long")


def add_options(parser: argparse.ArgumentParser, config: Any, usage: Usage) -> None:
    schema, texts = schema_of(config), texts_of(config)
    parser.add_argument("-h", "--help", nargs="?", choices=["all", *schema.groups], help=OWN["help"])
    parser.add_argument("--config", action="append", help=OWN["config"])
    for name in ("print_config", "version"):
        parser.add_argument(f"--{name}", action="store_true", help=OWN[name])
    for name, option in schema.options.items():
        nargs = "*" if is_list(option.hint) else "?" if bool in members(option.hint) else None
        action = parser.add_argument(f"--{name}", nargs=nargs, help=shortened(texts.get(name, "")))
        action.completer = completer(name, option.hint)  # type: ignore[attr-defined]
    if usage.arguments:
        parser.add_argument(usage.arguments, nargs="*")


def completer(name: str, hint: Any) -> Any:
    """The values of an option: its choices, files where it takes a text, nothing for a number."""
    if name == "env.id":
        return environment_ids
    kinds = [kind for k in members(hint) for kind in (get_args(k) if get_origin(k) in (list, tuple) else [k])]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if str in kinds and not choices:
        return FilesCompleter()
    choices += ["true", "false"] if bool in kinds else []
    choices += ["null"] if NONE in kinds and choices else []
    return lambda **kwargs: choices


def environment_ids(**kwargs: Any) -> Iterable[str]:
    import gymnasium

    import rl_lora.envs

    return [name for name in gymnasium.registry if name.startswith(f"{rl_lora.__name__}/")]
