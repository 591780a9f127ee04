"""How far log-probabilities in bfloat16 are from float32: those of rl_lora's sampler and learner, and of transformers.

`python scripts/benchmarks/benchmark_accuracy.py` samples completions with an adapter. transformers computes their
log-probabilities too, in bfloat16 and in float32, from the same weights, with the adapter's deltas added by hooks.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import ModelConfig
from rl_lora.learner.learner import target_logprobs
from rl_lora.learner.packing import pack
from rl_lora.lora.adapter import Adapter, Factors
from rl_lora.policy.loading import load_causal_lm
from rl_lora.scripts.benchmarks.measurements import Bench, Shape, shape
from rl_lora.scripts.command import main as command
from rl_lora.system.terminal import Terminal
from rl_lora.types import Group

SPREAD = 0.003
"""Standard deviation of B: about that of some tens of training steps."""


@dataclass
class AccuracyConfig:
    """Compare log-probabilities in bfloat16 with float32: rl_lora's sampler and learner, and transformers."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(dtype="bfloat16", compile=True))
    """The base model, and the data type that is compared with float32."""
    rollout: str = "8x8x32"
    """Completions to compare on, as prompts x completions x tokens."""
    rank: Annotated[int, Ge(1)] = 1
    """Rank of the adapter."""
    seed: Annotated[int, Ge(0)] = 0
    """Random seed of the problems, the adapter and the sampling."""


def run(config: AccuracyConfig) -> dict[str, float]:
    """Print the table. Returns its figures, and the `sampler_learner_kl` of an on-policy step."""
    case = shape(config.rollout)
    if case.n < 2:
        raise ValueError(f"the learner needs at least 2 completions of a prompt, got {config.rollout}")
    console = Terminal(width=None if sys.stdout.isatty() else 100)
    bench = Bench(config.model, rank=config.rank, seed=config.seed)
    bench.fresh()
    adapter, dtype = bench.policy.bank["bench"], bench.policy.dtype
    spread_out(adapter, dtype, config.seed)
    sides, groups = our_logprobs(bench, case)
    theirs = load_causal_lm(config.model.name, dtype, bench.policy.device, config.model.trust_remote_code)
    add_deltas(theirs, adapter)
    sides["transformers"] = plain_logprobs(theirs, groups)
    exact = plain_logprobs(theirs.float(), groups)
    kl = bench.learner.step(groups)[0].sampler_learner_kl
    figures = {"sampler_learner_kl": float("nan") if kl is None else kl}
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"{case}, {len(exact)} tokens: {name} beside float32", title_justify="left")
    for column in ("log-probabilities of", "mean |difference|", "largest", "mean difference"):
        table.add_column(column, justify="right" if table.columns else "left")
    for side, found in sides.items():
        gap = (found - exact).double()
        figures |= {f"{side}, mean": float(gap.abs().mean()), f"{side}, largest": float(gap.abs().max())}
        table.add_row(side, f"{gap.abs().mean():.5f}", f"{gap.abs().max():.4f}", f"{gap.mean():+.5f}")
    console.print(table)
    console.print(f"sampler_learner_kl of an on-policy step: {figures['sampler_learner_kl']:.5f}")
    return figures


def spread_out(adapter: Adapter, dtype: torch.dtype, seed: int) -> None:
    """Make B other than 0, and all numbers such that `dtype` holds them: what is compared is the arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.B.copy_(SPREAD * torch.randn(factors.B.shape, generator=generator))
        adapter.flat.copy_(adapter.flat.to(dtype))
    adapter.version += 1


def our_logprobs(bench: Bench, case: Shape) -> tuple[dict[str, Tensor], list[Group]]:
    """Float32 (tokens,) of the sampler and of the learner, in the order of the groups' tokens; and the groups."""
    groups, _ = bench.sample(bench.prompts(case.prompts), case, 0)
    sampler = torch.tensor([x for group in groups for episode in group.episodes for x in episode.turns[0].logprobs])
    learner = torch.empty_like(sampler)
    for batch in pack(
        [(numbered, np.ones(case.n)) for numbered in with_numbers(groups)],
        denominators={"bench": 1.0},
        tokens_per_microbatch=bench.learner.config.tokens_per_microbatch,
        shared_prefix=bench.policy.not_shared is None,
        device=bench.policy.device,
    ):
        logprobs, _ = target_logprobs(bench.policy, batch)
        learner[batch.behaviour_logprobs.long().cpu()] = logprobs.detach().cpu()
    return {"rl_lora, sampler": sampler, "rl_lora, learner": learner}, groups


def with_numbers(groups: Sequence[Group]) -> Iterator[Group]:
    """The groups with the tokens' numbers in place of their log-probabilities: packing changes their order."""
    number = itertools.count()
    for group in groups:
        episodes = []
        for episode in group.episodes:
            (turn,) = episode.turns
            numbers = tuple(float(next(number)) for _ in turn.logprobs)
            episodes.append(replace(episode, turns=(replace(turn, logprobs=numbers),)))
        yield replace(group, episodes=tuple(episodes))


def add_deltas(model: PreTrainedModel, adapter: Adapter) -> None:
    """Let the linear layers of a plain model add an adapter's deltas in its dtype: y + scale * (x A^T) B^T."""

    def hook(factors: Factors) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def added(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            A, B = factors.A.to(y), factors.B.to(y)
            return y + factors.scale * (args[0] @ A.t() @ B.t())

        return added

    for name, factors in adapter.factors.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"only adapters on linear layers can be compared, not on {name} ({type(layer).__name__})")
        layer.register_forward_hook(hook(factors))


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """Float32 (tokens,) by the model's own forward, the completions of a prompt at a time."""
    found = []
    for group in groups:
        turns = [episode.turns[0] for episode in group.episodes]
        rows = torch.tensor([turn.prompt_ids + turn.completion_ids for turn in turns], device=model.device)
        targets = rows[:, len(turns[0].prompt_ids) :]
        logits = model(rows[:, :-1], logits_to_keep=targets.shape[1]).logits
        logprobs = logits.float().log_softmax(-1).gather(2, targets[:, :, None])
        found.append(logprobs.flatten().cpu())
    return torch.cat(found)


def main() -> None:
    command(AccuracyConfig, run)


if __name__ == "__main__":
    main()
