"""Numbers and nouns that agree."""

from __future__ import annotations


def counted(n: int, noun: str, nouns: str = "") -> str:
    """A number and its noun: "1 step", "2,048 steps". `nouns`: a plural that takes more than an s."""
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}"
