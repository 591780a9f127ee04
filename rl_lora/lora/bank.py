"""LoRA as a bank of adapters over one frozen base: every row of a batch carries an adapter, or none.

`W + (alpha / r) B A` is never formed: a layer computes `W x + (alpha / r) B (A x)`. Left out on purpose: merging,
dropout, DoRA, and adapters on embeddings or on the output head.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rl_lora.kernels.frozen_linear import FrozenLinear, may_pack
from rl_lora.lora.adapter import Adapter, Factors, Site
from rl_lora.lora.peft_targets import peft_target

ALL_LINEAR = "all-linear"
MAX_STACKED = 128
"""Ranks, over all adapters of a batch, that are multiplied at once, each row's own picked out of them: a few products
more than needed, in place of two or three operations for each adapter."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Leaf names of linear layers that choose experts. Not adapted by default: they are control flow, not features."""


@dataclass(frozen=True)
class Run:
    """The entries of a batch that carry one adapter: a slice where they are neighbours, else their indices."""

    adapter: Adapter
    where: slice | Tensor


@dataclass(frozen=True)
class Routing:
    """Which entries carry which adapter. `size` entries; a layer that sees n * size tokens gives each entry n."""

    size: int
    runs: tuple[Run, ...]
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict, compare=False)

    @property
    def whole(self) -> Adapter | None:
        """The adapter of all entries, if there is just one and no entry goes without: the fast path."""
        if len(self.runs) == 1 and self.runs[0].where == slice(0, self.size):
            return self.runs[0].adapter
        return None

    def tokens(self, where: slice | Tensor, n_tokens: int) -> slice | Tensor:
        """`where`, in tokens instead of entries."""
        n, rest = divmod(n_tokens, self.size)
        assert rest == 0, f"{n_tokens} tokens cannot be shared by {self.size} rows"
        if isinstance(where, slice):
            return slice(where.start * n, where.stop * n)
        return (where[:, None] * n + torch.arange(n, device=where.device)).flatten()

    def others(self, ranks: tuple[int, ...], n_tokens: int, device: torch.device) -> Tensor:
        """bool (n_tokens, sum of ranks): where a column is not of the token's own adapter. ranks: of each run."""
        if ranks not in self._masks:
            mask = torch.ones(self.size, sum(ranks), dtype=torch.bool, device=device)
            start = 0
            for run, rank in zip(self.runs, ranks, strict=True):
                mask[run.where, start : start + rank] = False
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


class AdapterBank:
    """All adapters over one base model, and the routing of the batch that is being computed.

    Layers are wrapped when the first adapter needs them. Outside `route` the model is the base model.
    """

    def __init__(self, model: PreTrainedModel):
        if any(isinstance(module, LoRALinear | LoRAExperts) for module in model.modules()):
            raise ValueError("this model already has an adapter bank; add adapters to that one, or load the model anew")
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.device = next(model.parameters()).device
        self.may_pack = may_pack(model)
        self.sites = {site.name: site for site in find_sites(model)}
        self.language = language_model(model)
        """Path of the part that reads text, with a dot behind, in a model that has others; else empty."""
        config = model.config.get_text_config()
        self.active_experts = max(1, getattr(config, "num_experts_per_tok", None) or 1)
        self.adapters: dict[str, Adapter] = {}
        self.routing: Routing | None = None
        self._stacks: dict[tuple[str, torch.dtype], tuple[list[Any], Stack | None]] = {}
        self._routed: tuple[tuple[str | None, ...], Routing | None] | None = None
        self._wrapped: set[str] = set()

    def add(
        self,
        name: str,
        *,
        rank: int = 1,
        alpha: float = 32.0,
        targets: str | Sequence[str] = ALL_LINEAR,
        seed: int = 0,
    ) -> Adapter:
        """A fresh adapter on the layers that `targets` names (see `match`)."""
        sites = self.match(targets)
        device, experts = self.device, self.active_experts
        return self.put(Adapter(name, sites, rank=rank, alpha=alpha, seed=seed, active_experts=experts, device=device))

    def put(self, adapter: Adapter) -> Adapter:
        """Take in an adapter that was made elsewhere, on this bank's sites."""
        if adapter.name in self.adapters:
            raise ValueError(f"the bank already holds an adapter named {adapter.name!r}; remove it first")
        for site in adapter.sites:
            if self.sites.get(site.name) != site:
                here = self.sites.get(site.name)
                raise ValueError(f"adapter {adapter.name!r} stands on {site}, but the model has {here}")
        if adapter.sites != tuple(self.sites[name] for name in self.sites if name in adapter.factors):
            raise ValueError(f"the sites of adapter {adapter.name!r} must be in the model's order, each once")
        if refused := [site.name for site in adapter.sites if site.peft == "refused"]:
            warnings.warn(f"PEFT will not load adapter {adapter.name!r}: it stands on {refused[0]} ...", stacklevel=2)
        for site in adapter.sites:
            self._wrap(site)
        self.adapters[adapter.name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        del self.adapters[self[name].name]
        self._stacks.clear()
        self._routed = None

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(f"no adapter is named {name!r}; the bank holds {sorted(self.adapters) or 'none'}")
        return self.adapters[name]

    def match(self, targets: str | Sequence[str]) -> list[Site]:
        """Sites whose path is, or ends in, one of the names: `q_proj`, `mlp.down_proj`, `experts`.

        "all-linear" is all of them, but for those on which PEFT loads no adapter (`peft_targets.py`).

        Where a model reads images or sound too, these are sites of its language model; a name means sites elsewhere
        only if the language model has none of that name, e.g. `vision_tower.encoder.layers.0.self_attn.q_proj`.

        Raises:
            ValueError: a name matches nothing; the message lists what is there.
        """
        text = [site for site in self.sites.values() if site.name.startswith(self.language)]
        if targets == ALL_LINEAR:
            if strange := list(find_strange_experts(self.model)):
                warnings.warn(f"experts of an unknown form stay without an adapter: {strange[0]} ...", stacklevel=2)
            if refused := [site.name for site in text if site.peft == "refused"]:
                leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in refused))
                warnings.warn(
                    f"{len(refused)} layers stay without an adapter, since PEFT loads none there: {refused[0]} ...; "
                    f"name {leaves} in adapter.targets, beside the others, to adapt them all the same",
                    stacklevel=2,
                )
            return [site for site in text if site.peft != "refused"]
        names = [targets] if isinstance(targets, str) else list(targets)
        chosen: set[str] = set()
        for name in names:
            found = next(filter(None, (_named(name, sites) for sites in (text, self.sites.values()))), None)
            if not found:
                there = ", ".join(sorted({site.rpartition(".")[2] for site in self.sites}))
                meant = "" if re.fullmatch(r"[\w.-]*", name) else "; names, not patterns, are meant"
                raise ValueError(f"no module matches {name!r}{meant}; linear layers here are {there}")
            chosen |= found
        return [site for site in self.sites.values() if site.name in chosen]

    def left_alone(self, adapter: Adapter) -> dict[str, int]:
        """How many sites an adapter leaves alone in each of the parts of the model that are not its language model."""
        parts: Counter[str] = Counter()
        root = self.language.removesuffix(".").rpartition(".")[0]
        for name in self.sites.keys() - adapter.factors.keys():
            if not name.startswith(self.language):
                parts[name.removeprefix(f"{root}.").partition(".")[0]] += 1
        return dict(sorted(parts.items()))

    @contextmanager
    def route(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside, entry i of every forward pass carries `adapters[i]`, or the bare base where that is None.

        Entries are usually the rows of the batch; a single row whose tokens belong to several adapters gives one entry
        a token. A backward pass that recomputes activations must run inside as well.
        """
        key = tuple(adapters)
        if self._routed is None or self._routed[0] != key:
            self._routed = key, self._routing(key)  # kept, so that steps of the same rows bring nothing to the device
        previous, self.routing = self.routing, self._routed[1]
        try:
            yield
        finally:
            self.routing = previous

    def _routing(self, adapters: Sequence[str | None]) -> Routing | None:
        entries: dict[str, list[int]] = {}
        for i, name in enumerate(adapters):
            if name is not None:
                entries.setdefault(name, []).append(i)
        if not entries:
            return None
        runs = []
        for name, indices in entries.items():
            first, last = indices[0], indices[-1]
            if last - first + 1 == len(indices):
                where: slice | Tensor = slice(first, last + 1)
            else:
                where = torch.tensor(indices, device=self.device)
            runs.append(Run(self[name], where))
        return Routing(len(adapters), tuple(runs))

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

    def base_hash(self) -> str:
        """SHA-256 over the base's weights, by name: the same before and after training, or something is wrong."""
        digest = hashlib.sha256()
        weights = {name.replace(".base.", "."): tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _wrap(self, site: Site) -> None:
        path = site.module
        if path in self._wrapped:
            return
        parent_path, _, leaf = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        base = getattr(parent, leaf)
        setattr(parent, leaf, LoRAExperts(base, path, self) if site.experts else LoRALinear(base, path, self))
        self._wrapped.add(path)


class _Wrapper(nn.Module):
    """Stands in the place of a frozen layer. What a model reads off it (weight, in_features, ...) is the base's."""

    def __init__(self, base: nn.Module, name: str, bank: AdapterBank):
        super().__init__()
        self.base, self.name, self.bank = base, name, bank

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoRALinear(_Wrapper):
    """A frozen linear layer (nn.Linear, a subclass of it, or Conv1D) and the bank's adapters on it."""

    def __init__(self, base: nn.Module, name: str, bank: AdapterBank):
        super().__init__(base, name, bank)
        self.product: FrozenLinear | None = None
        if type(base) is nn.Linear:
            self.product = FrozenLinear(base.weight, base.bias, bank.may_pack)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.bank.routing
        # Deltas are added in place, and to no view: a view's gradient would be copied twice.
        x2 = x.reshape(-1, x.shape[-1])  # (N, in)
        y2: Tensor = (self.product or self.base)(x2)  # (N, out)
        if routing is not None:
            self._add_deltas(y2, x2, routing)
        return y2.view(*x.shape[:-1], y2.shape[-1])

    def _add_deltas(self, y2: Tensor, x2: Tensor, routing: Routing) -> None:
        if routing.whole is not None:
            if (factors := routing.whole.factors.get(self.name)) is not None:
                _add_delta(y2, x2, factors)
            return
        adapters = [run.adapter for run in routing.runs]
        if not torch.is_grad_enabled() and (stack := self.bank.stack(self.name, adapters, x2.dtype)) is not None:
            z = (x2 @ stack.A.t()).masked_fill_(routing.others(stack.ranks, len(x2), x2.device), 0)
            y2.addmm_(z, stack.B)  # zeros add nothing, not even rounding
            return
        for run in routing.runs:
            if (factors := run.adapter.factors.get(self.name)) is None:
                continue
            where = routing.tokens(run.where, len(x2))
            if isinstance(where, slice):
                _add_delta(y2[where], x2[where], factors)
            else:
                y2.index_copy_(0, where, _add_delta(y2[where], x2[where], factors))


def _add_delta(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """y += scale * x A^T B^T, in place. x: (N, in), y: (N, out)."""
    A, B = factors.to(x.dtype)
    if A.shape[0] == 1 and not torch.is_grad_enabled():  # elementwise, in half the time of a product of inner size one
        return y.addcmul_(x @ A.t(), B.t(), value=factors.scale)
    return y.addmm_(x @ A.t(), B.t(), alpha=factors.scale)


ExpertFactors = tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]
"""A and B of every expert, and the scale."""


class LoRAExperts(_Wrapper):
    """The experts of a transformers 5 MoE layer, kept as 3-D parameters, and the bank's adapters on them.

    Rows without an adapter run the base's own implementation (`experts_implementation`), apart from the others: how
    many tokens an expert gets decides the last bit of a matrix product, and the others' routing is theirs. Rows with an
    adapter run the loop below: what the eager implementation of `transformers` does, in its order, with the deltas
    added before each activation. To the bit, a fresh adapter is the base only under the eager implementation.
    """

    def __init__(self, base: nn.Module, name: str, bank: AdapterBank):
        super().__init__(base, name, bank)
        self.up_name = "gate_up_proj" if hasattr(base, "gate_up_proj") else "up_proj"
        self.n_experts = len(base.down_proj)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (N, d); top_k_index, top_k_weights: (N, K). Returns (N, d)."""
        routing = self.bank.routing
        if routing is None:
            return self.base(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        adapters = [run.adapter for run in routing.runs]
        adapter_of = torch.full((len(hidden_states),), -1, device=hidden_states.device)  # (N,)
        for i, run in enumerate(routing.runs):
            adapter_of[routing.tokens(run.where, len(hidden_states))] = i
        bare = torch.where(adapter_of < 0)[0]
        if len(bare):
            result.index_copy_(0, bare, self.base(hidden_states[bare], top_k_index[bare], top_k_weights[bare]))
        factors = {  # cast and taken apart once: each of E slices would have a gradient of the whole tensor's size
            leaf: [self._factors(adapter, leaf, hidden_states.dtype) for adapter in adapters]
            for leaf in (self.up_name, "down_proj")
        }
        chosen = top_k_index.t().masked_fill(adapter_of < 0, -1)  # (K, N)
        expert: int
        for expert in chosen.unique().tolist():
            if not 0 <= expert < self.n_experts:
                continue  # rows without an adapter, or a sentinel of expert parallelism
            slot, token = torch.where(chosen == expert)
            x, mine = hidden_states[token], adapter_of[token]
            h = self._linear(x, self.up_name, expert, factors[self.up_name], mine)
            h = self._activate(h)
            h = self._linear(h, "down_proj", expert, factors["down_proj"], mine)
            if getattr(self.base, "has_post_expert_norm", False):
                h = self.base.post_expert_norm(h)  # type: ignore[operator]
            h = h * top_k_weights[token, slot, None]
            result.index_add_(0, token, h.to(result.dtype))
        return result

    def _factors(self, adapter: Adapter, leaf: str, dtype: torch.dtype) -> ExpertFactors | None:
        factors = adapter.factors.get(f"{self.name}.{leaf}")
        if factors is None:
            return None
        A, B = factors.to(dtype)
        return A.unbind(), B.unbind(), factors.scale

    def _linear(
        self, x: Tensor, leaf: str, expert: int, factors: Sequence[ExpertFactors | None], mine: Tensor
    ) -> Tensor:
        weight, bias = getattr(self.base, leaf)[expert], getattr(self.base, f"{leaf}_bias", None)
        if getattr(self.base, "is_transposed", False):
            y = x @ weight if bias is None else x @ weight + bias[expert]  # one addmm would round otherwise
        else:
            y = nn.functional.linear(x, weight, None if bias is None else bias[expert])
        for i, own in enumerate(factors):
            if own is None:
                continue
            A, B, scale = own[0][expert], own[1][expert], own[2]
            if len(factors) == 1:
                y.addmm_(x @ A.t(), B.t(), alpha=scale)
            else:
                rows = torch.where(mine == i)[0]
                y.index_add_(0, rows, x[rows] @ A.t() @ B.t(), alpha=scale)
        return y

    def _activate(self, h: Tensor) -> Tensor:
        base = self.base
        if not getattr(base, "has_gate", True):
            return base.act_fn(h)  # type: ignore[operator]
        if hasattr(base, "_apply_gate"):
            return base._apply_gate(h)  # type: ignore[operator]
        gate, up = h.chunk(2, dim=-1)
        return base.act_fn(gate) * up  # type: ignore[operator]


def _named(name: str, sites: Iterable[Site]) -> set[str]:
    return {site.name for site in sites if any(f".{path}".endswith(f".{name}") for path in (site.name, site.module))}


def language_model(model: PreTrainedModel) -> str:
    """Where the part that reads text is in a model that has others, e.g. `model.language_model.`; empty where it is all
    of it, or cannot be told."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    return f"{path}." if path and decoder is not model.base_model else ""


def find_sites(model: PreTrainedModel) -> Iterator[Site]:
    """Every linear layer and every expert weight of the model, in module order; not the head, not the routers."""
    head = model.get_output_embeddings()
    target = peft_target(model)
    for path, module in model.named_modules():
        if module is head or path.rpartition(".")[2] in ROUTERS:
            continue
        if isinstance(module, Conv1D):
            yield Site(path, module.nx, module.nf, transposed=True)
        elif isinstance(module, nn.Linear):
            yield Site(path, module.in_features, module.out_features, peft=target(path))
        elif is_experts(module):
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3:
                    experts, out_features, in_features = weight.shape
                    if transposed := bool(getattr(module, "is_transposed", False)):
                        in_features, out_features = out_features, in_features
                    yield Site(f"{path}.{leaf}", in_features, out_features, experts, transposed)


def is_experts(module: nn.Module) -> bool:
    """Experts as transformers 5 writes them: 3-D parameters, and a forward of (hidden, top_k_index, top_k_weights)."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "has_gate") and isinstance(down, nn.Parameter) and down.dim() == 3


def find_strange_experts(model: PreTrainedModel) -> Iterator[str]:
    """Paths of 3-D weights that look like experts but do not follow the form above."""
    for path, module in model.named_modules():
        if not is_experts(module) and not isinstance(module, nn.Conv1d | LoRAExperts):
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3 and leaf.endswith("_proj"):
                    yield f"{path}.{leaf}"
