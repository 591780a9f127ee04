"""In a clone, the folders at the top level can be imported by their own names: `envs` is `rl_lora.envs` there.

They are the same modules, not copies: an exception that a reward function raises as `rewards.Unscorable` is the one
that an environment catches. An installed package has no such names, and leaves them to others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _SameModules(MetaPathFinder, Loader):
    """Finds `envs.text` as `rl_lora.envs.text`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith(f"{self.folder}.") else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(f"rl_lora.{module.__name__}")


def one_module(name: str) -> None:
    """Called by a folder's `__init__` with its `__name__`: under its short name it becomes its module in `rl_lora`."""
    if not name.startswith("rl_lora."):
        sys.meta_path.insert(0, _SameModules(name))
        sys.modules[name] = import_module(f"rl_lora.{name}")
