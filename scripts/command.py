"""What every command does around its work: parse a config dataclass, and end with a clear message and exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.text import Text

from rl_lora.scripts import signals
from rl_lora.scripts.options import Config, parse
from rl_lora.settings.validation import validate_bounds
from rl_lora.system.files import FileError
from rl_lora.system.invocation import is_first_process
from rl_lora.system.terminal import Terminal, guard

__all__ = ["main", "parse", "run"]
USER_ERROR, FAILURE = 2, 1
TYPED = {"None": "null", "True": "true", "False": "false"}
LIBRARIES = {"accelerate", "numpy", "tokenizers", "torch", "transformers"}


def run(work: Callable[[], object], when_interrupted: str = "") -> int:
    """Do the work; what users can mend is a line on standard error and exit code 2, anything else a traceback and 1."""
    console = Terminal(stderr=True)
    try:
        work()
    except (ValueError, FloatingPointError) as error:
        if raised_by(error) in LIBRARIES:
            raise  # not a message of ours: the traceback is what helps
        console.print(Text("error:", "bold red"), as_options_have_it(str(error)))
        return USER_ERROR if isinstance(error, ValueError) else FAILURE
    except FileError as error:
        console.print(Text("error:", "bold red"), str(error))
        return FAILURE
    except KeyboardInterrupt as error:
        if is_first_process():
            console.print(f"interrupted{when_interrupted}")
        return signals.ended_by(error)
    return 0


def as_options_have_it(message: str) -> str:
    """With values as they are typed here: null, true and false are what Python calls None, True and False."""
    return re.sub(r"\bgot (None|True|False)\b", lambda match: f"got {TYPED[match[1]]}", message)


def raised_by(error: BaseException) -> str:
    """The top-level package whose line raised it."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0] if traceback else ""


def main(config_type: type[Config], work: Callable[[Config], object], when_interrupted: str = "") -> NoReturn:
    """A command: parse, check the bounds of numbers, work, exit."""

    def checked() -> None:
        config = parse(config_type)
        validate_bounds(config)
        work(config)

    signals.listen()
    guard()
    sys.path.append(os.getcwd())  # environments and rewards of the user's own, also for the installed commands
    sys.exit(run(checked, when_interrupted))
