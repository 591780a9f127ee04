"""Train a LoRA adapter by reward: `python scripts/train.py --help`, or `accelerate launch scripts/train.py ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import scripts.signals  # noqa: F401  first: the other imports take seconds

# isort: split
import envs  # noqa: F401  registers the environments
from rl_lora.config import TrainConfig
from rl_lora.trainer import train
from scripts.command import main as command
from scripts.signals import goes_on


def main() -> None:
    command(TrainConfig, train, goes_on("--resume", "true"))


if __name__ == "__main__":
    main()
