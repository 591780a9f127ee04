"""The weights of one LoRA adapter: A and B for every layer it stands on, views of a single flat float32 vector.

    W' = W + (alpha / r) B A,   A uniform in +-1/sqrt(d_in), B = 0        (Hu et al. 2021; Schulman et al. 2025)

Knows nothing of models; `bank.py` puts adapters onto one, `peft_io.py` onto disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A weight that an adapter can stand on: a linear layer, or one 3-D parameter that holds E experts."""

    name: str
    """Module path; for experts, the path of the parameter: `model.layers.0.mlp.experts.down_proj`."""
    in_features: int
    out_features: int
    experts: int = 0
    """0 for a linear layer."""
    transposed: bool = False
    """The base keeps the weight as (in, out): GPT-2's Conv1D, some experts. A and B do not care."""
    peft: Literal["module", "weight", "refused"] = "module"
    """What PEFT is told to put an adapter here: the module, its weight, or nothing, since it would refuse."""

    @property
    def module(self) -> str:
        """Path of the module that holds the weight."""
        return self.name.rpartition(".")[0] if self.experts else self.name


class Factors:
    """A (r, in) and B (out, r) of one site, or A (E, r, in) and B (E, out, r) for experts; float32, with `scale`."""

    def __init__(self, adapter: Adapter, site: str, A: nn.Parameter, B: nn.Parameter, scale: float):
        self.adapter, self.site, self.A, self.B, self.scale = adapter, site, A, B, scale

    def to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the compute dtype; without gradients, those of `Adapter.cast`."""
        if dtype == self.A.dtype:
            return self.A, self.B
        if torch.is_grad_enabled():
            return self.A.to(dtype), self.B.to(dtype)
        return self.adapter.cast(dtype)[self.site]


@dataclass
class Cast:
    """An adapter's weights in another dtype: the state they were taken in, the vector, A and B of every site."""

    state: tuple[int, int]
    flat: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]


class Adapter:
    """One LoRA adapter: A and B for every site, as views of a single flat float32 vector.

    One vector means that the optimizer, the gradient norm, the all-reduce and the checkpoint each handle one tensor.
    `flat.grad` is allocated by `zero_grad` and filled in place by every backward.

    Args:
        rank: r >= 1. Experts of an MoE model get `max(1, rank // active_experts)`: the same total rank a token.
        ranks, alphas: exceptions by site name (PEFT's `rank_pattern`, `alpha_pattern`).
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        seed: of A. The values do not depend on the device.
    """

    def __init__(
        self,
        name: str,
        sites: Sequence[Site],
        *,
        rank: int,
        alpha: float = 32.0,
        seed: int = 0,
        active_experts: int = 1,
        ranks: dict[str, int] | None = None,
        alphas: dict[str, float] | None = None,
        rslora: bool = False,
        device: torch.device | str = "cpu",
    ):
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha}")
        if not sites:
            raise ValueError(f"adapter {name!r} stands on no layer")
        self.name, self.sites, self.rank, self.alpha, self.rslora = name, tuple(sites), rank, float(alpha), rslora
        self.version = 0
        """Optimizer steps so far; whoever steps adds one, and must, since cached casts depend on it."""
        self.ranks = {
            site.name: (ranks or {}).get(site.name, max(1, rank // active_experts) if site.experts else rank)
            for site in sites
        }
        if min(self.ranks.values()) < 1:
            raise ValueError(f"every rank must be >= 1, got {self.ranks}")
        self.alphas = {site.name: float((alphas or {}).get(site.name, alpha)) for site in sites}
        for site_name, of_site in self.alphas.items():
            if not 0 < of_site < math.inf:
                raise ValueError(f"alpha of {site_name} must be > 0 and finite, got {of_site}")
        self._shapes_flat = [shape for site in sites for shape in self._shapes(site)]
        self.flat = nn.Parameter(torch.zeros(sum(map(math.prod, self._shapes_flat)), device=device))
        self.factors = self._factors()
        self._casts: dict[torch.dtype, Cast] = {}
        self.initialize(seed)

    def _factors(self) -> dict[str, Factors]:
        views = self._views(self.flat.detach(), self._shapes_flat)  # detach, unlike data, shares the version counter
        factors = {}
        for site in self.sites:
            r, alpha = self.ranks[site.name], self.alphas[site.name]
            scale = alpha / math.sqrt(r) if self.rslora else alpha / r
            factors[site.name] = Factors(self, site.name, nn.Parameter(next(views)), nn.Parameter(next(views)), scale)
        return factors

    def cast(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of every site in another dtype, as views of one vector that is kept, and brought up to date here.

        Torch counts every in-place change of the weights, those of fused optimizers excepted: `version` counts them.
        """
        state = self.version, self.flat._version
        if dtype not in self._casts:
            with torch.inference_mode(False), torch.no_grad():  # else it could be changed in there only
                flat = self.flat.to(dtype, copy=True)
            views = self._views(flat, self._shapes_flat)
            self._casts[dtype] = Cast(state, flat, {site.name: (next(views), next(views)) for site in self.sites})
        cast = self._casts[dtype]
        if cast.state != state:
            with torch.no_grad():
                cast.flat.copy_(self.flat)
            cast.state = state
        return cast.factors

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("factors", "_casts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copied or unpickled adapter: A and B must be views of its own vector again
        self.factors = self._factors()
        self._casts = {}

    def _shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts = (site.experts,) if site.experts else ()
        r = self.ranks[site.name]
        return (*experts, r, site.in_features), (*experts, site.out_features, r)

    @staticmethod
    def _views(flat: Tensor, shapes: Iterable[tuple[int, ...]]) -> Iterator[Tensor]:
        start = 0
        for shape in shapes:
            stop = start + math.prod(shape)
            yield flat[start:stop].view(shape)
            start = stop

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """A uniform in +-1/sqrt(d_in), B zero: a fresh adapter changes nothing."""
        generator = torch.Generator().manual_seed(seed)
        for site in self.sites:
            factors = self.factors[site.name]
            bound = 1 / math.sqrt(site.in_features)
            factors.A.copy_((torch.rand(factors.A.shape, generator=generator) * 2 - 1) * bound)
            factors.B.zero_()

    def parameters(self) -> Iterator[nn.Parameter]:
        for factors in self.factors.values():
            yield factors.A
            yield factors.B

    def zero_grad(self) -> None:
        """Point every A.grad and B.grad into one flat gradient of zeros."""
        if self.flat.grad is None:
            self.flat.grad = torch.zeros_like(self.flat)
        self.flat.grad.zero_()
        for parameter, grad in zip(self.parameters(), self._views(self.flat.grad, self._shapes_flat), strict=True):
            parameter.grad = grad

    @property
    def n_parameters(self) -> int:
        return self.flat.numel()

    @torch.no_grad()
    def norms(self) -> tuple[float, float]:
        """Euclidean norms of all entries of A, over all sites, and of all entries of B."""
        A, B = (
            torch.stack([matrix.norm() for matrix in matrices]).norm().item()
            for matrices in zip(*((factors.A, factors.B) for factors in self.factors.values()), strict=True)
        )
        return A, B

    def hash(self) -> str:
        """SHA-256 of the weights, for reports and for proofs that nothing moved."""
        return hashlib.sha256(self.flat.detach().cpu().numpy().tobytes()).hexdigest()

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, rank={self.rank}, alpha={self.alpha:g}, {self.n_parameters:,} parameters)"
