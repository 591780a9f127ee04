"""Which samples an evaluation needs, in which batches, and the key of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.candidates import BASE
from rl_lora.evaluation.sample_store import Key
from rl_lora.lora.adapter import Adapter
from rl_lora.metrics.records import Record
from rl_lora.metrics.samples import content_hash
from rl_lora.policy.policy import Policy
from rl_lora.rollout.worker import MakeEnv
from rl_lora.trainer.task import ProblemRecord, sources

AHEAD = 4
"""Samples of a batch of problems for each row that is decoded at a time. A larger batch loses more samples when the
process dies; a smaller one leaves more rows empty while its last samples are drawn."""


@dataclass(frozen=True)
class SampleSet:
    """The samples of one problem under one model, which is one adapter (None: the base) with these weights."""

    adapter: str | None
    weights: str
    sampling_hash: str
    problem: ProblemRecord

    def key(self, k: int) -> Key:
        """The key of sample number k: `sample_store.IDENTITY`."""
        return self.weights, self.sampling_hash, self.problem.hash, k


def adapter_hash(adapter: Adapter) -> str:
    """A hash of all that decides what an adapter computes: its weights and scales, but not its name or its folder."""
    return content_hash(adapter.hash(), adapter.ranks, adapter.alphas, adapter.rslora)


def sampling_settings(config: EvaluateConfig, policy: Policy, make_env: MakeEnv) -> Record:
    """What decides, beside problem and adapter, which samples are drawn and how they are judged.

    Left out is what changes rounding only: how many rows are decoded at a time, and on which device. Of code,
    `task.sources` says what is looked at.
    """
    return {
        "base": policy.bank.base_hash(),
        "dtype": str(policy.dtype),
        "chat_template": content_hash(policy.chat.tokenizer.chat_template),
        "template_kwargs": policy.chat.template_kwargs,
        "stop_ids": sorted(policy.chat.stop_ids),
        "env": {"id": config.env.id, "kwargs": config.env.kwargs, "env_kwargs": config.env_kwargs},
        "env_code": content_hash(*sources(make_env)),
        "system_prompt": config.system_prompt,
        "max_tokens": config.max_tokens,
        "max_turns": config.max_turns,
        "temperature": config.temperature,
        "seed": config.seed if config.temperature > 0 else None,
    }


def plan_batches(
    config: EvaluateConfig, problems: Sequence[ProblemRecord], hashes: dict[str, str], sampling_hash: str
) -> list[list[SampleSet]]:
    """Batches of equal shares of the problems, each under every model: the same ones when an evaluation goes on, so
    that it comes to the same in any arithmetic. A batch has about AHEAD * max_rows rows; adapters with the same weights
    are one model."""
    models = {weights: None if name == BASE else name for name, weights in reversed(hashes.items())}
    order = dict.fromkeys(hashes.values())
    n_batches = max(1, round(len(problems) * len(models) * config.n / (AHEAD * config.max_rows)))
    return [
        [SampleSet(models[weights], weights, sampling_hash, problems[i]) for weights in order for i in part]
        for part in np.array_split(np.arange(len(problems)), n_batches)
        if len(part)
    ]
