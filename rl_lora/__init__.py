"""RL policy-gradient training of LoRA adapters on Hugging Face causal language models.

One frozen base, many adapters in every batch: see the README for the commands, and for the way through the house.
"""

from rl_lora.adapter import Adapter
from rl_lora.adapter_io import load_adapter, save_adapter
from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.evaluator import evaluate
from rl_lora.learner import Learner
from rl_lora.lora import AdapterBank
from rl_lora.native_sampler import NativeSampler
from rl_lora.policy import Policy
from rl_lora.rollout import RolloutWorker
from rl_lora.sampler import Completion, Request, Sampler
from rl_lora.trainer import Trainer, train

__all__ = [
    "Adapter",
    "AdapterBank",
    "Completion",
    "EvaluateConfig",
    "Learner",
    "NativeSampler",
    "Policy",
    "Request",
    "RolloutWorker",
    "Sampler",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "load_adapter",
    "save_adapter",
    "train",
]
__version__ = "0.1.0"
