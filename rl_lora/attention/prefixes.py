"""The prefixes that prompts of one adapter share: each is computed, and kept, once for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

MIN_PREFIX = 16
"""Tokens that prompts must have in common for their prefix to be a span of its own."""

Prefix = tuple[str | None, tuple[int, ...]]
"""An adapter, and tokens that sequences of it begin with."""


def find_shared_prefixes(prompts: Iterable[Prefix]) -> list[Prefix]:
    """The prefixes that at least two of these prompts share; each prompt goes on for a token at least."""
    alike: dict[Prefix, set[tuple[int, ...]]] = {}
    for adapter, ids in prompts:
        alike.setdefault((adapter, ids[:MIN_PREFIX]), set()).add(ids)
    prefixes = []
    for (adapter, _), members in alike.items():
        n = min(common_prefix(members), min(map(len, members)) - 1)
        if len(members) > 1 and n >= MIN_PREFIX:
            prefixes.append((adapter, min(members)[:n]))
    return prefixes


def prefix_of(prefixes: Sequence[Prefix], adapter: str | None, prompt: tuple[int, ...]) -> int | None:
    """The index of the prefix that a prompt continues; None where it continues none."""
    for i, (of, ids) in enumerate(prefixes):
        if of == adapter and len(prompt) > len(ids) and prompt[: len(ids)] == ids:
            return i
    return None


def common_prefix(sequences: Collection[tuple[int, ...]]) -> int:
    """Tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, these two differ the soonest
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
