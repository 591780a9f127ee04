"""Which entries of a batch carry which adapter, and the factors of several adapters side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl_lora.kernels import packed_gemm
from rl_lora.kernels.adapted_linear import Ranks
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.lora.adapter import Adapter, Factors

MAX_STACKED = 128
"""Ranks, over all adapters of a batch, that are multiplied at once, each row's own picked out of them: a few products
more than needed, in place of two or three operations for each adapter."""
MOST_KEPT = 32
"""Tensors of tokens' ranks that a routing keeps, of so many lengths and sets of ranks."""


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
    _rows: dict[tuple[tuple[int, ...], int], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

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

    def rows(self, ranks: tuple[int, ...], n_tokens: int) -> tuple[Tensor, Tensor]:
        """int64 (n_tokens,), (n_tokens,): where each token's ranks begin in a `Stack`, and how many it has."""
        if (ranks, n_tokens) not in self._rows:
            if len(self._rows) == MOST_KEPT:
                self._rows.clear()
            first, count = torch.zeros(2, self.size, dtype=torch.int64)
            start = 0
            for assignment, rank in zip(self.assignments, ranks, strict=True):
                first[assignment.where], count[assignment.where] = start, rank
                start += rank
            n = n_tokens // self.size
            self._rows[ranks, n_tokens] = first.repeat_interleave(n), count.repeat_interleave(n)
        return self._rows[ranks, n_tokens]


@dataclass(frozen=True)
class Stack:
    """The A and B of several adapters on one layer below one another, in the compute dtype."""

    ranks: tuple[int, ...]
    """Of each adapter; 0 where it does not stand on the layer."""
    A: Tensor
    """(K, in) with K their sum; in whole panels (>= K, >= in) with zeros behind, as `RowDeltas` has it."""
    B: Tensor
    """(K, out), with the scale in it; as A."""
    factors: tuple[Factors, ...]
    """Those that it was made from, and where each lies in it."""
    places: tuple[Ranks, ...]
    finite: bool
    """No number is infinite or NaN."""


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
        self.fixed: Mapping[str, RowDeltas] | None = None
        """By site; where given, they stand in place of the routing's."""
        self._stacks: dict[tuple[str, torch.dtype, bool], tuple[list[Any], Stack | None]] = {}
        self._deltas: tuple[Routing, Any, dict[str, RowDeltas]] | None = None

    def stack(self, site: str, dtype: torch.dtype, panels: bool = False) -> Stack | None:
        """The factors of the batch's adapters on one layer, kept until they change; None where none stands there.

        With gradients it is of no use by itself: it is no view of the adapters.
        panels: rows are whole panels in memory.
        """
        assert self.routing is not None
        there = [assignment.adapter.factors.get(site) for assignment in self.routing.assignments]
        state = [factors and (factors.adapter, factors.adapter.version, factors.A._version) for factors in there]
        key = site, dtype, panels
        if key not in self._stacks or self._stacks[key][0] != state:
            self._stacks[key] = state, _stack(there, dtype, panels)
        return self._stacks[key][1]

    def deltas(self, site: str, n_tokens: int, dtype: torch.dtype) -> tuple[RowDeltas, Stack | None] | None:
        """What each of so many tokens adds on one layer, and the stack that it comes from; None where none does."""
        if self.fixed is not None:
            return None if site not in self.fixed else (self.fixed[site], None)
        if self.routing is None or (stack := self.stack(site, dtype, True)) is None:
            return None
        first, count = self.routing.rows(stack.ranks, n_tokens)
        return RowDeltas(stack.A, stack.B, first, count, max(stack.ranks)), stack

    def deltas_of(self, sites: Iterable[str], dtype: torch.dtype) -> dict[str, RowDeltas]:
        """Those of one token an entry, of all sites that have any; kept until the batch or its adapters change."""
        if self.routing is None:
            return {}
        adapters = [assignment.adapter for assignment in self.routing.assignments]
        state = dtype, [(adapter.version, adapter.flat._version) for adapter in adapters]
        if self._deltas is None or self._deltas[0] is not self.routing or self._deltas[1] != state:
            found = {site: self.deltas(site, self.routing.size, dtype) for site in sites}
            of_sites = {site: of_site[0] for site, of_site in found.items() if of_site is not None}
            self._deltas = self.routing, state, of_sites
        return self._deltas[2]

    def forget(self) -> None:
        """Let go of the factors of adapters that have been removed."""
        self._stacks.clear()
        self._deltas = None


@torch.no_grad()
def _stack(there: Sequence[Factors | None], dtype: torch.dtype, panels: bool) -> Stack | None:
    """there: of each adapter, None where it does not stand on the layer."""
    found = [factors for factors in there if factors is not None]
    if not found:
        return None
    below = (
        torch.cat([factors.A for factors in found]),
        torch.cat([factors.scale * factors.B.t() for factors in found]),
    )
    A, B = (_in_panels(x, dtype) if panels else x.to(dtype) for x in below)
    ranks = [0 if factors is None else len(factors.A) for factors in there]
    ends = list(itertools.accumulate(ranks))
    places = [
        Ranks(end - n, end, factors.scale)
        for end, n, factors in zip(ends, ranks, there, strict=True)
        if factors is not None
    ]
    finite = bool(A.isfinite().all() & B.isfinite().all())
    return Stack(tuple(ranks), A, B, tuple(found), tuple(places), finite)


def _in_panels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, n) in memory of whole panels, and of two rows at least: a program for several then does for one as well."""
    K, n = x.shape
    memory = x.new_zeros(max(2, K), packed_gemm.padded(n), dtype=dtype)
    memory[:K, :n] = x
    return memory
