"""Whether something can be a reference: what a reward function says of it before any completion is judged."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from rl_lora.rewards.judging import WeightedSum
from rl_lora.rewards.math.verdict import check_reference as check_math
from rl_lora.rewards.math.verdict import math_match
from rl_lora.rewards.numeric import check_reference as check_numeric
from rl_lora.rewards.numeric import numeric_match
from rl_lora.rewards.score import RewardFunction

CHECKS = {math_match: check_math, numeric_match: check_numeric}
"""Of the built-in functions that need a reference of a certain kind. A function of one's own may have an attribute
`check_reference`, a function that raises ValueError for what cannot be one."""


def reference_fault(reward: RewardFunction, reference: Any) -> str | None:
    """Why `reward` could judge no completion by this reference, or None if nothing speaks against it."""
    if isinstance(reward, WeightedSum):
        faults = (reference_fault(part.function, reference) for part in reward.parts)
        return next((fault for fault in faults if fault is not None), None)
    if isinstance(reward, functools.partial):
        return reference_fault(reward.func, reference)
    check = getattr(reward, "check_reference", None)
    with contextlib.suppress(TypeError):  # a callable object without a hash
        check = CHECKS.get(reward, check)
    if check is None:
        return None
    try:
        check(reference)
    except ValueError as error:
        return str(error)
    return None
