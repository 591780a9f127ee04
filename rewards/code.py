"""The source that a reward function judges with, as a text: whoever keeps its verdicts can tell that it has changed.

Not followed: what a module of one's own imports.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from rewards.combine import WeightedSum
from rewards.score import RewardFunction, name_of


def code_of(reward: RewardFunction) -> str:
    """The source of the function's module, or of all modules of `rewards` for a function of this package; of a sum,
    those of its parts. Where the module has no source, as in a REPL, the function's own, or else its bytecode. And what
    it was made with: the options of a `partial`, the plain values of a closure, the plain attributes of an object."""
    if isinstance(reward, WeightedSum):
        return "\n".join(code_of(part.function) for part in reward.parts)
    if isinstance(reward, functools.partial):
        given = _plain({**dict(enumerate(reward.args)), **reward.keywords})
        return f"{code_of(reward.func)}\n{given}" if given else code_of(reward.func)
    module = str(getattr(reward, "__module__", None))
    if module.partition(".")[0] == __package__:
        return _package()
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        source = ""
    return "\n".join(text for text in (source, _own(reward, bool(source))) if text)


def _own(reward: RewardFunction, has_module: bool) -> str:
    """What of a function the source of its module does not say: which of the module's it is, and what it holds."""
    name = name_of(reward)
    if not isinstance(reward, FunctionType):
        return f"{name} {_plain(vars(reward) if hasattr(reward, '__dict__') else {})}"
    held = _plain(inspect.getclosurevars(reward).nonlocals) if reward.__closure__ else ""
    try:
        own = "" if has_module else inspect.getsource(reward)
    except (OSError, TypeError):
        own = str(_bytecode(reward.__code__))
    if has_module and "<lambda>" in name:
        own = str(_bytecode(reward.__code__))  # several may stand in one line
    return " ".join(text for text in (own, held) if text) or name


def _plain(values: Mapping[Any, Any]) -> str:
    """Those that are numbers, texts, lists and mappings: others have no form that is the same in every process."""
    texts = []
    for name, value in sorted(values.items(), key=lambda item: str(item[0])):
        with suppress(TypeError, ValueError):
            texts.append(f"{name}={json.dumps(value, sort_keys=True)}")
    return ", ".join(texts)


def _bytecode(code: CodeType) -> tuple[Any, ...]:
    constants = (_bytecode(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts)
    return code.co_code.hex(), code.co_names, code.co_varnames, *constants


@functools.cache
def _package() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
