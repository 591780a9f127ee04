"""An evaluation that takes its time, to be killed in the middle: `python -m tests.slow_evaluation CONFIG`, as JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora import EvaluateConfig, evaluate
from rl_lora.config import EnvConfig, ModelConfig
from rl_lora.evaluation.sample_store import SampleStore

if __name__ == "__main__":
    torch.set_num_threads(1)
    fields = json.loads(sys.argv[1])
    config = EvaluateConfig(**fields | {"model": ModelConfig(**fields["model"]), "env": EnvConfig(**fields["env"])})
    append = SampleStore.append

    def slowly(self: SampleStore, samples: Any) -> None:
        append(self, samples)
        time.sleep(0.3)

    SampleStore.append = slowly  # type: ignore[method-assign]
    evaluate(config)
