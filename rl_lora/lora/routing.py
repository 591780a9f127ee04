"""Which entries of a batch carry which adapter, and the factors of several adapters side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl_lora.lora.adapter import Adapter

MAX_STACKED = 128
"""Ranks, over all adapters of a batch, that are multiplied at once, each row's own picked out of them: a few products
more than needed, in place of two or three operations for each adapter."""


@dataclass(frozen=True)
class Assignment:
    """The entries of a batch that carry one adapter: a slice where they are neighbours, else their indices."""

    adapter: Adapter
    where: slice | Tensor


@dataclass(frozen=True)
class Routing:
    """Which entries carry which adapter. `size` entries; a layer that sees n * size tokens gives each entry n."""

    size: int
    assignments: tuple[Assignment, ...]
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict, compare=False)

    @property
    def only_adapter(self) -> Adapter | None:
        """The adapter of all entries, if there is just one and no entry goes without: the fast path."""
        if len(self.assignments) == 1 and self.assignments[0].where == slice(0, self.size):
            return self.assignments[0].adapter
        return None

    def tokens(self, where: slice | Tensor, n_tokens: int) -> slice | Tensor:
        """`where`, in tokens instead of entries."""
        n, rest = divmod(n_tokens, self.size)
        assert rest == 0, f"{n_tokens} tokens cannot be shared by {self.size} rows"
        if isinstance(where, slice):
            return slice(where.start * n, where.stop * n)
        return (where[:, None] * n + torch.arange(n, device=where.device)).flatten()

    def others(self, ranks: tuple[int, ...], n_tokens: int, device: torch.device) -> Tensor:
        """bool (n_tokens, sum of ranks): where a column is not of the token's own adapter. ranks: by assignment."""
        if ranks not in self._masks:
            mask = torch.ones(self.size, sum(ranks), dtype=torch.bool, device=device)
            start = 0
            for assignment, rank in zip(self.assignments, ranks, strict=True):
                mask[assignment.where, start : start + rank] = False
                start += rank
            self._masks[ranks] = mask
        return self._masks[ranks].repeat_interleave(n_tokens // self.size, 0)


@dataclass(frozen=True)
class Stack:
    """The A and B of several adapters on one layer side by side: A (K, in), B (K, out) with the scale in it."""

    ranks: tuple[int, ...]
    """Of each adapter; 0 where it does not stand on the layer. K is their sum."""
    A: Tensor
    B: Tensor


def routing_of(
    names: Sequence[str | None], adapter_of: Callable[[str], Adapter], device: torch.device
) -> Routing | None:
    """Entry i carries the adapter that `names[i]` names; None where no entry carries any."""
    entries: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            entries.setdefault(name, []).append(i)
    if not entries:
        return None
    assignments = []
    for name, indices in entries.items():
        first, last = indices[0], indices[-1]
        if last - first + 1 == len(indices):
            where: slice | Tensor = slice(first, last + 1)
        else:
            where = torch.tensor(indices, device=device)
        assignments.append(Assignment(adapter_of(name), where))
    return Routing(len(names), tuple(assignments))


class CurrentRouting:
    """The routing of the batch that is being computed, as the layers read it, and what they stack for it."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self._stacks: dict[tuple[str, torch.dtype], tuple[list[Any], Stack | None]] = {}

    def stack(self, site: str, adapters: Sequence[Adapter], dtype: torch.dtype) -> Stack | None:
        """The factors of these adapters on one layer, kept until they change; None where there would be too many, or
        one has diverged.

        With gradients it is of no use: it is no view of the adapters.
        """
        there = [adapter.factors.get(site) for adapter in adapters]
        state = [factors and (factors.adapter, factors.adapter.version, factors.A._version) for factors in there]
        if (site, dtype) not in self._stacks or self._stacks[site, dtype][0] != state:
            found = [factors for factors in there if factors is not None]
            stack = None
            if found and sum(len(factors.A) for factors in found) <= MAX_STACKED:
                A = torch.cat([factors.A for factors in found]).to(dtype)
                B = torch.cat([factors.scale * factors.B.t() for factors in found]).to(dtype)
                if bool(A.isfinite().all() & B.isfinite().all()):  # else 0 * NaN would reach the others' rows
                    stack = Stack(tuple(0 if factors is None else len(factors.A) for factors in there), A, B)
            self._stacks[site, dtype] = state, stack
        return self._stacks[site, dtype][1]

    def forget(self) -> None:
        """Let go of the factors of adapters that have been removed."""
        self._stacks.clear()
