"""Adapters on disk: PEFT directories (`adapter_config.json`, `adapter_model.safetensors`), without importing `peft`.

Tensors decide: each of them must find its place, and a setting that would change the result and is not understood is an
error (`adapter_config.py`). Left out on purpose: pickles (`adapter_model.bin`) and every kind
but plain LoRA.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rl_lora.lora.adapter import Adapter, Site
from rl_lora.lora.adapter_config import excerpt, read_config, resolve_patterns
from rl_lora.lora.bank import AdapterBank
from rl_lora.system import files
from rl_lora.system.model_names import canonical, public_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base"
"""In the metadata of the weights: the base's name here, where others know it by another (`public_name`)."""
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+?)(?P<nesting>(\.base_layer)*)\.(?P<factor>lora_[AB])\.weight")
MAX_KEY = 1000
"""Characters of a tensor's name."""
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What weights can be of, as safetensors calls it: numbers that stand for themselves, without a scale beside them."""
FOREIGN = {"lora_embedding": "an adapter on embeddings", "lora_magnitude": "DoRA", ".bias": "a trained bias"}

Levels = Mapping[int, tuple[str, str]]
"""The keys of A and B on one module, by depth of nesting: PEFT wraps a module once for each of its parameters."""


def save_adapter(adapter: Adapter, folder: str | Path, base_model: str, *, overwrite: bool = False) -> Path:
    """Write `adapter` so that `PeftModel.from_pretrained(base, folder)` gives the same logits. Returns the folder.

    The folder appears whole or not at all. With `overwrite`, an existing one is moved aside first, then deleted.

    Raises:
        ValueError: the folder exists, and `overwrite` is not set or it holds no adapter.
        FileError: the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not (overwrite and (folder / CONFIG).is_file()):
        raise ValueError(f"{folder} already exists; choose another, or replace an adapter folder with overwrite=True")
    files.clear_left_overs(folder.parent, glob.escape(folder.name))
    exact = {} if public_name(base_model) == base_model else {BASE: base_model}
    with files.new_folder(folder) as draft:
        files.write_bytes(draft / WEIGHTS, save(_tensors(adapter), metadata={"format": "pt"} | exact))
        files.write_text(draft / CONFIG, json.dumps(_config(adapter, base_model), indent=2) + "\n")
    return folder


def load_adapter(folder: str | Path, bank: AdapterBank, name: str | None = None) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote and put it into `bank`, as `name` (default: the folder's).

    Tensors of any dtype become float32. `lora_dropout` has no counterpart here and is not taken over: a run that starts
    from such an adapter says so.

    Raises:
        ValueError: what `check_adapter` finds, or the adapter does not fit the bank's model; says which tensor.
    """
    folder = Path(folder)
    config, modules, tensors = _read(folder)
    weights = dict[str, tuple[Tensor, ...]]()
    for path, levels in modules.items():
        for site, depth in _sites_of(path, levels, config, bank):
            weights[site.name] = tuple(_unflatten(site, tensors[key], key) for key in levels[depth])
    ranks, alphas = _patterns(config, list(weights), folder)
    for site_name, (A, B) in weights.items():
        if {A.shape[-2], B.shape[-1]} != {ranks[site_name]}:
            found = f"A has rank {A.shape[-2]} and B rank {B.shape[-1]}, but {CONFIG} says {ranks[site_name]}"
            raise ValueError(f"{folder}: {site_name}: {found}; are the files of one adapter?")
    adapter = Adapter(
        name or folder.resolve().name,
        [site for site in bank.sites.values() if site.name in weights],
        rank=config["r"],
        alpha=config["lora_alpha"],
        ranks=ranks,
        alphas=alphas,
        rslora=bool(config.get("use_rslora")),
        device=bank.device,
    )
    with torch.no_grad():
        for site_name, (A, B) in weights.items():
            adapter.factors[site_name].A.copy_(A)
            adapter.factors[site_name].B.copy_(B)
    return bank.put(adapter)


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Find what can be known to be wrong with an adapter folder before a model is loaded. Returns its configuration.

    Raises:
        ValueError: a file is missing or unreadable; not a plain LoRA; a tensor that no linear layer or expert has.
    """
    return _read(Path(folder))[0]


def lora_dropout(folder: Path) -> float:
    """The share of inputs that whoever trained an adapter dropped while training; ours, and those that we save, 0."""
    return float(read_config(folder / CONFIG).get("lora_dropout") or 0)


def base_of(folder: str | Path) -> str:
    """The base that an adapter was trained on, by the name that it has here; empty where the folder does not say.

    Raises:
        ValueError: what `check_adapter` finds.
    """
    public = check_adapter(folder).get("base_model_name_or_path") or ""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        exact = (file.metadata() or {}).get(BASE, "")
    return canonical(exact if public_name(exact) == public else public)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Levels], dict[str, Tensor]]:
    """Configuration, the keys of the tensors by module path, and the tensors in float32; all of it checked."""
    if not folder.is_dir():
        raise ValueError(
            f"no adapter folder at {folder}; a run saves its first adapter with its first checkpoint: let it come that "
            "far, or name another folder"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = "; save it again with a current peft, pickles are not read" if any(folder.glob("*.bin")) else ""
            raise ValueError(f"{folder} is not a PEFT adapter folder: {name} is missing{hint}")
    config = read_config(folder / CONFIG)
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            modules = _pair({key: tuple(x.get_shape()) for key, x in slices.items()}, file)
            _patterns(config, list(modules), folder)
            for key, x in slices.items():
                if (dtype := x.get_dtype()) not in DTYPES:
                    raise ValueError(f"{file}: {key} is of type {dtype}; LoRA weights are floating-point numbers")
            tensors = {key: opened.get_tensor(key).float() for key in slices}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {excerpt(str(error))}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are not finite in float32; take an earlier checkpoint")
    return config, modules, tensors


def _patterns(config: Mapping[str, Any], names: list[str], folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of every name."""
    file, targets = folder / CONFIG, tuple(f".{name}" for name in config.get("target_parameters") or [])
    # PEFT matches with the path of what it targets: a module, or a parameter of it.
    paths = [f"{name}.weight" if f".{name}.weight".endswith(targets) else name for name in names]
    ranks, alphas = (
        resolve_patterns(config.get(field), paths, config[default], file, field)
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return dict(zip(names, ranks, strict=True)), dict(zip(names, alphas, strict=True))


def _pair(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Levels]:
    """Every key must be one of a pair, A and B of one module at one depth."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for key, shape in shapes.items():
        if len(key) > MAX_KEY or (match := KEY.fullmatch(key)) is None:
            kind = next((kind for mark, kind in FOREIGN.items() if mark in key), "unknown")
            only = "only PEFT's LoRA weights of linear layers and experts are read"
            raise ValueError(f"{file}: {excerpt(key)} is {kind}; {only}")
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{file}: {key} has shape {shape}, expected two dimensions; was a sharded model saved?")
        stem = key.removesuffix(f"{match['factor']}.weight")
        pair = (f"{stem}lora_A.weight", f"{stem}lora_B.weight")
        if missing := set(pair) - set(shapes):
            raise ValueError(f"{file}: {key} is there, but not {missing.pop()}; the file is incomplete")
        found.setdefault(match["path"], {})[match["nesting"].count("base_layer")] = pair
    if not found:
        raise ValueError(f"{file} holds no tensor")
    return {**found}


def _sites_of(path: str, levels: Levels, config: Mapping[str, Any], bank: AdapterBank) -> Iterable[tuple[Site, int]]:
    """The sites of one module and how deep PEFT nested each: the parameter that is defined first lies innermost."""
    if path in bank.sites and set(levels) == {0}:
        return [(bank.sites[path], 0)]
    there = [site for site in bank.sites.values() if site.experts and site.module == path]
    if len(there) != len(levels):
        names = config.get("target_parameters") or []
        there = [site for site in there if f".{site.name}".endswith(tuple(f".{name}" for name in names))]
    if len(there) != len(levels) or set(levels) != set(range(len(levels))):
        raise ValueError(f"the adapter has weights for {path!r}, but {_why_not(path, bank)}")
    return zip(there, sorted(levels, reverse=True), strict=True)


def _why_not(path: str, bank: AdapterBank) -> str:
    try:
        kind = type(bank.model.get_submodule(path)).__name__
    except AttributeError:
        some = ", ".join(list(bank.sites)[:3])
        return f"the model has no such module (it has {some}, ...); the adapter is for another model"
    return f"that is a {kind} which carries none: adapters stand on linear layers and experts, not on head or router"


def _unflatten(site: Site, tensor: Tensor, key: str) -> Tensor:
    """A (E*r, in) -> (E, r, in) and B (out, r*E) -> (E, out, r) for experts; the shape is checked against the site."""
    is_A, experts = key.endswith("lora_A.weight"), max(1, site.experts)
    wide, features = tensor.shape if is_A else reversed(tensor.shape)
    expected = site.in_features if is_A else site.out_features
    if features != expected or wide % experts:
        rank = f"rank * {experts}" if site.experts else "rank"
        needs = f"({rank}, {expected})" if is_A else f"({expected}, {rank})"
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}, the model needs {needs}; it is for another model")
    if not site.experts:
        return tensor
    return tensor.reshape(experts, -1, features) if is_A else tensor.reshape(features, -1, experts).permute(2, 0, 1)


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What goes to disk, as `_sites_of` and `_unflatten` read it."""
    tensors: dict[str, Tensor] = {}
    for site in adapter.sites:
        A, B = (factor.detach().cpu() for factor in (adapter.factors[site.name].A, adapter.factors[site.name].B))
        key = PREFIX + site.module
        if site.experts:
            siblings = [other for other in adapter.sites if other.experts and other.module == site.module]
            key += ".base_layer" * (len(siblings) - 1 - siblings.index(site))
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    """Targets are full paths: PEFT would also adapt any other module whose path ends in a shorter name."""
    called = {site.name: f"{site.name}.weight" if site.peft == "weight" else site.name for site in adapter.sites}
    parameters = [called[site.name] for site in adapter.sites if site.experts or site.peft == "weight"]
    modules = [site.name for site in adapter.sites if not site.experts and site.peft != "weight"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(base_model),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed and not site.experts for site in adapter.sites),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": {called[name]: r for name, r in adapter.ranks.items() if r != adapter.rank},
        "alpha_pattern": {called[name]: _number(a) for name, a in adapter.alphas.items() if a != adapter.alpha},
        "use_rslora": adapter.rslora,
        "use_dora": False,
    }


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
