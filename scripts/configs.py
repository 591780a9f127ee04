"""The options of the commands that are not all of a run's: what follows the training of an adapter, or comes before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from rl_lora.config import LearnerConfig, ModelConfig, RolloutConfig, TrainConfig, expand_home


@dataclass
class SftConfig(TrainConfig):
    """Train a LoRA adapter on an environment's demonstrations, by maximum likelihood. Training by reward goes on from
    there with `rl-lora train --adapter.init_from RUN_DIR/adapter`."""

    run_dir: str = "runs/sft"
    """Folder for everything that this run writes."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts_per_step=32, group_size=1))
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(objective="likelihood"))


@dataclass
class ReportConfig:
    """Write report.html into the folder of a training run, also while the run is going on, or of an evaluation."""

    folders: list[str] = field(default_factory=list)
    """Folders of runs and evaluations, such as runs/NAME."""
    out: str | None = None
    """File for the page, of one folder only. By default report.html in that folder."""

    def __post_init__(self) -> None:
        expand_home(self, "folders", "out")


@dataclass
class PlotConfig:
    """Draw the held-out accuracy of runs over their steps, with 95 % intervals."""

    runs: list[str] = field(default_factory=list)
    """Run folders. A run that started from the adapter of another one (adapter.init_from) is drawn from where that one
    ended."""
    out: str = "accuracy.png"
    """File for the picture: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        expand_home(self, "runs", "out")


@dataclass
class BenchmarkConfig:
    """Measure rollouts, learning and training steps: tokens/s, share of the machine's matrix-product peak, peak
    memory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    random: Literal["llama-135m", "llama-1b", "llama-8b"] | None = None
    """Shape of a known model, with random weights, in place of the model's own: the cost depends on the shape alone."""
    rollouts: list[str] = field(default_factory=lambda: ["8x8x32", "32x8x16"])
    """Rollouts to measure, as prompts x completions x tokens; no completion ends early. The learner then learns from
    them."""
    steps: list[str] = field(default_factory=lambda: ["16x8x16", "8x8x128"])
    """Training steps to measure on two-digit additions, as prompts x completions x limit of tokens."""
    peer: list[str] = field(default_factory=list)
    """Other libraries to measure in turns: trl (steps); transformers, transformers-continuous, vllm (rollouts, which
    these draw from the bare base)."""
    peer_python: str = ".venv-peers/bin/python"
    """Python interpreter of the environment that holds trl, peft and transformers."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Python interpreter of the environment that holds vllm."""
    peer_dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the peers' base and activations. By default the same as ours."""
    rounds: Annotated[int, Ge(1)] = 3
    """Measurements of each side, after one for warming up."""
    adapters: list[Annotated[int, Ge(1)]] = field(default_factory=lambda: [1])
    """Numbers of fresh adapters that the prompts of a rollout are dealt out to, such as 1 8. All are measured in turns
    and compared with the first. Training steps have one adapter, and so must measurements beside peers."""
    rank: Annotated[int, Ge(1)] = 1
    """Rank of the adapters."""
    seed: Annotated[int, Ge(0)] = 0
    """Random seed of the problems, the adapters and the sampling, those of the peers too."""
    breakdown: bool = False
    """Tables of the time of rollouts and learning by kind of work, measured after the rounds; measuring them slows the
    work down."""
    out: str = "benchmark.json"
    """File for all figures of all rounds."""

    def __post_init__(self) -> None:
        expand_home(self, "peer_python", "vllm_python", "out")
