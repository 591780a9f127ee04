"""The source that a reward function judges with, as a text: whoever keeps its verdicts can tell that it has changed.

Not followed: what a module of one's own imports.
"""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path

from rewards.combine import WeightedSum
from rewards.score import RewardFunction, name_of


def code_of(reward: RewardFunction) -> str:
    """The source of the function's module, or of all modules of `rewards` for a function of this package; of a sum,
    those of its parts. Where there is no source, as of a function typed into a REPL, the function's name."""
    if isinstance(reward, WeightedSum):
        return "\n".join(code_of(part.function) for part in reward.parts)
    if isinstance(reward, functools.partial):
        return code_of(reward.func)
    module = str(getattr(reward, "__module__", None))
    if module.partition(".")[0] == __package__:
        return _package()
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return name_of(reward)


@functools.cache
def _package() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
