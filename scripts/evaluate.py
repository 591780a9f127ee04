"""Evaluate adapters side by side over one base: `python scripts/evaluate.py --adapters runs/a runs/b`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # also when the package is not installed

import rl_lora.scripts.signals

# isort: split
import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.evaluator import evaluate
from rl_lora.scripts.command import main as command
from rl_lora.scripts.signals import goes_on


def main() -> None:
    command(EvaluateConfig, evaluate, goes_on())


if __name__ == "__main__":
    main()
