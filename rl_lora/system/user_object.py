"""Objects of a user's own modules, named `module:name`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any


def user_object(name: str, kind: str) -> Any:
    """What `module:name` names. The module is looked for on Python's path, then in the working directory.

    `kind`: of the object, for messages: reward, objective, ...

    Raises:
        ValueError: the module cannot be imported, or has nothing of that name that can be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{kind} {name!r}: one of your own is written 'module:function'")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{kind} {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            f"it must be installed, on PYTHONPATH or in {os.getcwd()}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        wrong = "nothing called" if found is None else f"no function, but a {type(found).__name__}, called"
        raise ValueError(f"{kind} {name!r}: {module_name} has {wrong} {attribute!r}; functions: {', '.join(there)}")
    return found
