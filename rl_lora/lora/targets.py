"""The sites of a model that an adapter can stand on, found by the form of its layers or by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rl_lora.lora.adapter import Site
from rl_lora.lora.layers import LoRAExperts
from rl_lora.lora.peft_targets import peft_target

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Leaf names of linear layers that choose experts. Not adapted by default: they are control flow, not features."""


def language_model(model: PreTrainedModel) -> str:
    """The path of the language model in a model with other parts, e.g. `model.language_model.`; empty where there are
    no other parts, or the path is not known."""
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


def find_unknown_experts(model: PreTrainedModel) -> Iterator[str]:
    """Paths of 3-D weights that look like experts but do not follow the form of `is_experts`."""
    for path, module in model.named_modules():
        if not is_experts(module) and not isinstance(module, nn.Conv1d | LoRAExperts):
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3 and leaf.endswith("_proj"):
                    yield f"{path}.{leaf}"


def sites_named(name: str, sites: Iterable[Site]) -> set[str]:
    """The sites whose path, or whose module's path, is or ends in `name`."""
    return {site.name for site in sites if any(f".{path}".endswith(f".{name}") for path in (site.name, site.module))}
