"""What a slow reward costs: training steps with a free one, one that sleeps and one that awaits, in turns.

    python scripts/benchmarks/benchmark_rewards.py [--seconds 0.2] [--rounds 3]

The rewards give the same numbers, so all three learn the same.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EvalConfig, LogConfig, ModelConfig, RolloutConfig, TrainConfig
from rl_lora.metrics.records import MetricsFile, Record
from rl_lora.rewards import numeric_match
from rl_lora.trainer.trainer import train


def kinds_of(seconds: float) -> dict[str, Callable[..., Any]]:
    """The rewards that are compared: the arithmetic verdict, at once and after so many seconds."""

    def free(completion: str, reference: Any) -> float:
        return numeric_match(completion, reference).value

    def sleeping(completion: str, reference: Any) -> float:
        time.sleep(seconds)
        return numeric_match(completion, reference).value

    async def awaiting(completion: str, reference: Any) -> float:
        await asyncio.sleep(seconds)
        return numeric_match(completion, reference).value

    return {"free": free, "sleeping": sleeping, "awaiting": awaiting}


def last_step(args: argparse.Namespace, reward: Callable[..., Any]) -> Record:
    """The record of the second step: a first one is slower, and finds out what waits."""
    with tempfile.TemporaryDirectory() as folder:
        rollout = RolloutConfig(prompts_per_step=args.prompts, group_size=args.group, max_tokens=args.max_tokens)
        config = TrainConfig(
            run_dir=f"{folder}/run",
            steps=2,
            model=ModelConfig(name=args.model),
            rollout=rollout,
            eval=EvalConfig(episodes=0),
            log=LogConfig(samples_every=0, trackers=[]),
        )
        train(config, reward=reward)
        return MetricsFile(Path(config.run_dir) / "metrics.jsonl").read("train")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="that a call of a slow reward takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=ModelConfig().name)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=16)
    args = parser.parse_args()
    kinds = kinds_of(args.seconds)
    rounds = [{name: last_step(args, reward) for name, reward in kinds.items()} for _ in range(args.rounds)]
    stages = ("rollout", "reward", "learn")
    print(f"a step of {args.prompts} x {args.group}, medians of {args.rounds} rounds, seconds")
    print(f"{'reward':10}{'step':>8}{''.join(f'{stage:>10}' for stage in stages)}   to free")
    for name in kinds:
        took = [[one[name][f"seconds/{stage}"] for stage in stages] for one in rounds]
        free = [sum(one["free"][f"seconds/{stage}"] for stage in stages) for one in rounds]
        ratio = statistics.median(sum(mine) / theirs for mine, theirs in zip(took, free, strict=True))
        columns = "".join(f"{statistics.median(column):10.2f}" for column in zip(*took, strict=True))
        print(f"{name:10}{statistics.median(map(sum, took)):8.2f}{columns}{ratio:10.2f}")


if __name__ == "__main__":
    main()
