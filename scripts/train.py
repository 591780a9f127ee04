"""Train a LoRA adapter by reward: `python scripts/train.py --help`, or `accelerate launch scripts/train.py ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import envs  # noqa: F401  registers the environments
from rl_lora.config import TrainConfig
from rl_lora.trainer import train
from scripts.command import main as command


def main() -> None:
    command(TrainConfig, train, "; --resume true continues from the last checkpoint")


if __name__ == "__main__":
    main()
