"""What PEFT must be told to put an adapter on a linear layer: the layer, its weight, or nothing, as it would refuse.

PEFT itself is not imported: these are its rules of 0.21, and the renaming that it takes over from transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from transformers import PreTrainedModel

Target = Literal["module", "weight", "refused"]

OLD_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Leaf names that PEFT, in many mixtures of experts, takes for the experts of transformers 4, wherever they stand, and
replaces in `target_modules` by other targets of other ranks. `target_parameters` it leaves as they are."""
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types on whose `out_proj` PEFT refuses an adapter: kernels for training read its weight past any adapter."""


def peft_target(model: PreTrainedModel) -> Callable[[str], Target]:
    """For the path of a linear layer of this model: what to name, so that PEFT loads the layer's adapter."""
    has_experts = any("expert" in field for field in model.config.get_text_config().to_dict())
    is_mamba = model.config.model_type in MAMBA
    rename = _renaming(model)

    def target(path: str) -> Target:
        leaf = path.rpartition(".")[2]
        key = f"{path}.lora_A.weight"
        if (is_mamba and leaf == "out_proj") or not key.endswith(rename(key)):
            return "refused"
        return "weight" if has_experts and leaf in OLD_EXPERTS else "module"

    return target


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """What PEFT makes of the name of an adapter's tensor: what transformers makes of names in checkpoints of the base.

    Some of these rules change names that are right already, such as `shared_expert.` where any character may follow.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        if get_checkpoint_conversion_mapping(model.config.model_type) is None:
            return lambda key: key
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        return lambda key: str(rename_source_key(key, renamings, [])[0])
    except (ImportError, AttributeError, TypeError):  # not yet, or no longer, part of transformers
        return lambda key: key
