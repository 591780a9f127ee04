"""Format: does the completion, as a whole, look as asked? Says nothing about whether it is right."""

from __future__ import annotations

import re
from typing import Any

from rl_lora.rewards.numeric import SIGNS, UNSIGNED

JUST_A_NUMBER = rf"\s*[{SIGNS}]?{UNSIGNED}\.?\s*"


def format_match(completion: str, reference: Any = None, *, pattern: str = JUST_A_NUMBER) -> float:
    """1.0 if the whole completion matches the regular expression `pattern`, else 0.0.

    The default asks for one number, white space around it and a full stop behind it allowed. A dot does not match a
    line break unless the pattern begins with "(?s)". The cost of a pattern that backtracks is its author's.

    Raises:
        ValueError: `pattern` is not a regular expression.
    """
    try:
        matcher = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
    return float(matcher.fullmatch(completion) is not None)
