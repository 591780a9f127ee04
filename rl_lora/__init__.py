"""RL policy-gradient training of LoRA adapters on Hugging Face causal language models.

One frozen base, many adapters in every batch. The names below are the public interface; each is imported when it is
first used, so that `import rl_lora` itself is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lora.config import EvaluateConfig as EvaluateConfig
    from rl_lora.config import TrainConfig as TrainConfig
    from rl_lora.evaluation.evaluator import evaluate as evaluate
    from rl_lora.learner.learner import Learner as Learner
    from rl_lora.lora.adapter import Adapter as Adapter
    from rl_lora.lora.bank import AdapterBank as AdapterBank
    from rl_lora.lora.peft_io import load_adapter as load_adapter
    from rl_lora.lora.peft_io import save_adapter as save_adapter
    from rl_lora.policy.loading import load_causal_lm as load_causal_lm
    from rl_lora.policy.policy import Policy as Policy
    from rl_lora.rollout.worker import RolloutWorker as RolloutWorker
    from rl_lora.sampler.native import NativeSampler as NativeSampler
    from rl_lora.sampler.protocol import Completion as Completion
    from rl_lora.sampler.protocol import Request as Request
    from rl_lora.sampler.protocol import Sampler as Sampler
    from rl_lora.trainer.trainer import Trainer as Trainer
    from rl_lora.trainer.trainer import train as train

_HOMES = {
    "Adapter": "rl_lora.lora.adapter",
    "AdapterBank": "rl_lora.lora.bank",
    "Completion": "rl_lora.sampler.protocol",
    "EvaluateConfig": "rl_lora.config",
    "Learner": "rl_lora.learner.learner",
    "NativeSampler": "rl_lora.sampler.native",
    "Policy": "rl_lora.policy.policy",
    "Request": "rl_lora.sampler.protocol",
    "RolloutWorker": "rl_lora.rollout.worker",
    "Sampler": "rl_lora.sampler.protocol",
    "TrainConfig": "rl_lora.config",
    "Trainer": "rl_lora.trainer.trainer",
    "evaluate": "rl_lora.evaluation.evaluator",
    "load_adapter": "rl_lora.lora.peft_io",
    "load_causal_lm": "rl_lora.policy.loading",
    "save_adapter": "rl_lora.lora.peft_io",
    "train": "rl_lora.trainer.trainer",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
