"""LoRA as a bank of adapters over one frozen base: every row of a batch carries an adapter, or none.

`W + (alpha / r) B A` is never formed: a layer computes `W x + (alpha / r) B (A x)`. Left out on purpose: merging,
dropout, DoRA, and adapters on embeddings or on the output head.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rl_lora.kernels import adapted_linear
from rl_lora.kernels.frozen_linear import packed_copies
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.lora.adapter import Adapter, Site
from rl_lora.lora.layers import LoRAExperts, LoRALinear
from rl_lora.lora.routing import CurrentRouting, Routing, routing_of
from rl_lora.lora.targets import find_sites, find_unknown_experts, language_model, sites_named

ALL_LINEAR = "all-linear"


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
        self.copies = packed_copies(model)
        self.sites = {site.name: site for site in find_sites(model)}
        self.language = language_model(model)
        """Path of the part that reads text, with a dot behind, in a model that has others; else empty."""
        config = model.config.get_text_config()
        self.active_experts = max(1, getattr(config, "num_experts_per_tok", None) or 1)
        self.adapters: dict[str, Adapter] = {}
        self._current = CurrentRouting()
        self._routed: tuple[tuple[str | None, ...], Routing | None] | None = None
        self._wrapped: dict[str, LoRALinear | LoRAExperts] = {}

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
        self._current.forget()
        self._routed = None

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(f"no adapter is named {name!r}; the bank holds {sorted(self.adapters) or 'none'}")
        return self.adapters[name]

    @property
    def routing(self) -> Routing | None:
        """Of the batch that is being computed; None where no row carries an adapter."""
        return self._current.routing

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
            if unknown := list(find_unknown_experts(self.model)):
                warnings.warn(f"experts of an unknown form stay without an adapter: {unknown[0]} ...", stacklevel=2)
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
            found = next(filter(None, (sites_named(name, sites) for sites in (text, self.sites.values()))), None)
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
            # Kept, so that steps of the same rows bring nothing to the device.
            self._routed = key, routing_of(key, self.__getitem__, self.device)
        previous, self._current.routing = self._current.routing, self._routed[1]
        try:
            yield
        finally:
            self._current.routing = previous

    def deltas(self, dtype: torch.dtype) -> dict[str, RowDeltas]:
        """What the batch's entries add on each site, for a token each; without the sites where torch adds it."""
        if not adapted_linear.serves(self.device.type, dtype):
            return {}
        in_one = (name for name, m in self._wrapped.items() if isinstance(m, LoRALinear) and m.product is not None)
        return self._current.deltas_of(in_one, dtype)

    @contextmanager
    def fixed(self, deltas: Mapping[str, RowDeltas]) -> Iterator[None]:
        """Inside, these are added, whatever the batch's adapters are."""
        previous, self._current.fixed = self._current.fixed, deltas
        try:
            yield
        finally:
            self._current.fixed = previous

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
        wrapper: LoRALinear | LoRAExperts
        if site.experts:
            wrapper = LoRAExperts(base, path, self._current)
        else:
            wrapper = LoRALinear(base, path, self._current, self.copies)
        setattr(parent, leaf, wrapper)
        self._wrapped[path] = wrapper
