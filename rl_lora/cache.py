"""Where things that were made once are kept for all runs of a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rl_lora`, by default `~/.cache/rl_lora`; it may not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"  # the standard: relative values are ignored
    return cache / "rl_lora"
