"""Train a LoRA adapter by reward: `python scripts/train.py --help`, or `accelerate launch scripts/train.py ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import rl_lora.scripts.signals

# isort: split
import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import TrainConfig
from rl_lora.scripts.command import main as command
from rl_lora.scripts.signals import goes_on
from rl_lora.trainer.trainer import train


def main() -> None:
    command(TrainConfig, train, goes_on("--resume", "true"))


if __name__ == "__main__":
    main()
