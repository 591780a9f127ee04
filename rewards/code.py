"""The source that a reward function judges with, as a text: whoever keeps its verdicts can tell that it has changed.

Left out: the modules that a module of one's own imports (`modules_of` names where to begin).
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

from rl_lora.rewards.judging import WeightedSum
from rl_lora.rewards.score import RewardFunction, is_built_in, name_of


def code_of(reward: RewardFunction) -> str:
    """The source of the function's module, or of all modules of `rewards` for a function of this package; of a sum,
    those of its parts. In a script that is run, a notebook or a REPL, the function's own, or else its bytecode, and of
    what it uses there: the rest of a script, such as the number of steps, may be edited. And what it was made with: the
    options of a `partial`, the plain values of a closure, the plain attributes of an object."""
    if isinstance(reward, WeightedSum):
        return "\n".join(code_of(part.function) for part in reward.parts)
    if isinstance(reward, functools.partial):
        given = _plain({**dict(enumerate(reward.args)), **reward.keywords})
        return f"{code_of(reward.func)}\n{given}" if given else code_of(reward.func)
    if is_built_in(reward):
        return _package()
    module = str(getattr(reward, "__module__", None))
    try:
        source = "" if module == "__main__" else inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        source = ""
    return "\n".join(text for text in (source, _own(reward, bool(source))) if text)


def modules_of(reward: RewardFunction) -> set[str]:
    """The names of the modules in which a reward function, or the parts of a sum, are defined."""
    if isinstance(reward, WeightedSum):
        return {name for part in reward.parts for name in modules_of(part.function)}
    if isinstance(reward, functools.partial):
        return modules_of(reward.func)
    return {str(getattr(reward, "__module__", None))}


def _own(reward: RewardFunction, has_module: bool) -> str:
    """What of a function the source of its module does not say: which of the module's it is, and what it holds."""
    name = name_of(reward)
    if not isinstance(reward, FunctionType):
        methods = "" if has_module else _reached(type(reward))
        return f"{name} {_plain(vars(reward) if hasattr(reward, '__dict__') else {})} {methods}".rstrip()
    held = _plain(inspect.getclosurevars(reward).nonlocals) if reward.__closure__ else ""
    own = "" if has_module else _reached(reward)
    if has_module and "<lambda>" in name:
        own = str(_bytecode(reward.__code__))  # several may stand in one line
    return " ".join(text for text in (own, held) if text) or name


def _reached(start: FunctionType | type) -> str:
    """The source of a function, or of a class's methods, and of the functions, classes and plain values of its module
    that it names."""
    texts: list[str] = []
    rest, seen = [start], set[int]()
    while rest:
        each = rest.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, type):
            rest += [value for value in vars(each).values() if isinstance(value, FunctionType)]
            continue
        try:
            texts.append(inspect.getsource(each))
        except (OSError, TypeError):
            texts.append(str(_bytecode(each.__code__)))
        named = {name: each.__globals__[name] for name in sorted(_names(each.__code__)) if name in each.__globals__}
        rest += [v for v in named.values() if isinstance(v, FunctionType | type) and v.__module__ == each.__module__]
        if plain := _plain(named):
            texts.append(plain)
    return "\n".join(texts)


def _names(code: CodeType) -> set[str]:
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*inner)


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
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py")))
