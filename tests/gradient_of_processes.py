"""Run by `accelerate launch`: the gradient of this process's share of some groups, over all processes, into a file.

gradient_of_processes.py MODEL_FOLDER GROUPS_FILE OUT_FILE
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator

from rl_lora.config import LearnerConfig
from rl_lora.learner.learner import Learner
from rl_lora.policy.policy import Policy
from rl_lora.types import Group
from tests.tiny import randomize


def gradient(model: str, groups: list[Group], accelerator: Accelerator | None) -> torch.Tensor:
    """The gradient that a step on the groups leaves in the adapter, unclipped."""
    policy = Policy.load(model, dtype="float32")
    adapter = randomize(policy.bank.add("a", rank=2), 0)
    Learner(policy, LearnerConfig(max_grad_norm=0.0), accelerator=accelerator).step(groups)
    assert adapter.flat.grad is not None
    return adapter.flat.grad


if __name__ == "__main__":
    model, groups_file, out = sys.argv[1:]
    accelerator = Accelerator()
    groups = pickle.loads(Path(groups_file).read_bytes())
    share = groups[accelerator.process_index :: accelerator.num_processes]
    assert accelerator.num_processes == 2
    assert len(share) < len(groups)
    result = gradient(model, share, accelerator)
    if accelerator.is_main_process:
        torch.save(result, out)
    accelerator.end_training()
