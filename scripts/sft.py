"""Train a LoRA adapter on demonstrations, before it is trained by reward: `python scripts/sft.py --help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import rl_lora.scripts.signals

# isort: split
import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import LearnerConfig, RolloutConfig, TrainConfig
from rl_lora.scripts.command import main as command
from rl_lora.scripts.signals import goes_on
from rl_lora.trainer.trainer import train


@dataclass
class SftConfig(TrainConfig):
    """Train a LoRA adapter on an environment's demonstrations, by maximum likelihood. What follows is
    `scripts/train.py --adapter.init_from RUN_DIR/adapter`."""

    run_dir: str = "runs/sft"
    """Where everything of this run is written."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts_per_step=32, group_size=1))
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(objective="likelihood"))


def main() -> None:
    command(SftConfig, train, goes_on("--resume", "true"))


if __name__ == "__main__":
    main()
