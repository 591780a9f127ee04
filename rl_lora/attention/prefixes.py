"""What prompts of one adapter begin with in common: it is computed, and kept, once for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

MIN_TRUNK = 16
"""Tokens that prompts must have in common for their beginning to be a span of its own."""

Trunk = tuple[str | None, tuple[int, ...]]
"""An adapter, and what several of its prompts begin with."""


def find_trunks(prompts: Iterable[Trunk]) -> list[Trunk]:
    """What at least two of these prompts, each with its adapter, begin with; it leaves each a token of its own."""
    alike: dict[Trunk, set[tuple[int, ...]]] = {}
    for adapter, ids in prompts:
        alike.setdefault((adapter, ids[:MIN_TRUNK]), set()).add(ids)
    trunks = []
    for (adapter, _), members in alike.items():
        n = min(common_prefix(members), min(map(len, members)) - 1)
        if len(members) > 1 and n >= MIN_TRUNK:
            trunks.append((adapter, min(members)[:n]))
    return trunks


def trunk_of(trunks: Sequence[Trunk], adapter: str | None, prompt: tuple[int, ...]) -> int | None:
    """The index of the trunk that a prompt goes on from."""
    for i, (of, ids) in enumerate(trunks):
        if of == adapter and len(prompt) > len(ids) and prompt[: len(ids)] == ids:
            return i
    return None


def common_prefix(sequences: Collection[tuple[int, ...]]) -> int:
    """Tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, these two differ the soonest
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
