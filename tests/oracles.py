"""What sampling, packing and learning are measured against: the model itself, one sequence at a time, in float64.

Full logits, the model's own attention, autograd through every formula; no code of the paths that are tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora.lora.bank import AdapterBank
from rl_lora.policy.policy import Policy
from rl_lora.sampler.protocol import Completion, Request
from rl_lora.types import Episode, Group, Stop, Turn
from tests.tiny import EOS_ID, randomize, tiny_model, tiny_tokenizer, token_ids

TokenObjective = Callable[[Tensor, Tensor, float], Tensor]
"""(log-probabilities (T,), behaviour log-probabilities (T,), advantage) -> objective of each token (T,)"""


def tiny_policy(
    arch: str = "llama",
    adapters: Sequence[str] = ("a",),
    stop_tokens: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """A policy with adapters of different ranks, all of them far from zero."""
    policy = Policy(tiny_model(arch, dtype=dtype), tiny_tokenizer(chat_template=False), stop_tokens=stop_tokens)
    for i, name in enumerate(adapters):
        randomize(policy.bank.add(name, rank=1 + i, alpha=8), seed=i + 1)
    return policy


class Oracle:
    """A float64 copy of a tiny policy and of its adapters as they are now."""

    def __init__(self, policy: Policy, model: str | PreTrainedModel = "llama"):
        self.model = tiny_model(model) if isinstance(model, str) else model
        self.model.double().eval()
        self.bank = AdapterBank(self.model)
        for adapter in policy.bank.adapters.values():
            self.bank.put(copy.deepcopy(adapter)).zero_grad()

    def logits(self, ids: Sequence[int], adapter: str | None) -> Tensor:
        """float64 (T, V)"""
        with self.bank.route([adapter]):
            logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def distributions(self, turn: Turn, adapter: str | None, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the whole vocabulary at each token of the completion: float64 (T, V)."""
        logits = self.logits(turn.prompt_ids + turn.completion_ids, adapter)[len(turn.prompt_ids) - 1 : -1]
        return (logits / temperature).log_softmax(-1)

    def logprobs(self, turn: Turn, adapter: str | None, temperature: float = 1.0) -> Tensor:
        """float64 (T,)"""
        return self.distributions(turn, adapter, temperature).gather(1, torch.tensor(turn.completion_ids)[:, None])[
            :, 0
        ]

    def gradients(
        self,
        groups: Sequence[tuple[Group, Sequence[float]]],
        objective: TokenObjective,
        denominators: Mapping[str, float],
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Of -sum_t objective_t / denominator, by adapter. groups: with one advantage an episode."""
        for adapter in self.bank.adapters.values():
            adapter.zero_grad()
        for group, advantages_G in groups:
            assert group.adapter is not None
            for episode, advantage in zip(group.episodes, advantages_G, strict=True):
                for turn in episode.turns:
                    if turn.completion_ids:
                        logprobs = self.logprobs(turn, group.adapter, temperature)
                        behaviour = torch.tensor(turn.logprobs, dtype=torch.float64)
                        tokens = objective(logprobs, behaviour, float(advantage))
                        (-tokens.sum() / denominators[group.adapter]).backward()
        return {name: gradient(adapter.flat).clone() for name, adapter in self.bank.adapters.items()}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def turn(
    prompt: Sequence[int], n: int, *, seed: int, ends: bool = False, logprobs: Sequence[float] | None = None
) -> Turn:
    """A reply of n random tokens, or of n - 1 and the stop token."""
    completion = token_ids(1, n, seed)[0].tolist() if n else []
    if ends and n:
        completion[-1] = EOS_ID
    return Turn(
        tuple(prompt),
        tuple(completion),
        tuple([-1.0] * n if logprobs is None else logprobs),
        Stop.END if ends else Stop.LENGTH,
    )


def episode(*turns: Turn, reward: float = 0.0, adapter: str | None = "a") -> Episode:
    return Episode("test", 0, turns, reward, Stop.END, adapter)


def group(*episodes: Episode, adapter: str | None = "a") -> Group:
    return Group("test", 0, adapter, episodes)


def with_behaviour(groups: Sequence[Group], oracle: Oracle, noise: float, temperature: float = 1.0) -> list[Group]:
    """The same groups, as if a policy nearby had written them: the oracle's log-probabilities plus noise."""
    rng = np.random.default_rng(0)

    def heard(t: Turn, adapter: str | None) -> Turn:
        with torch.no_grad():
            exact = oracle.logprobs(t, adapter, temperature).numpy()
        noisy = exact + noise * rng.standard_normal(len(exact))
        return Turn(t.prompt_ids, t.completion_ids, tuple(noisy.tolist()), t.stop)

    return [
        Group(
            g.env_id,
            g.seed,
            g.adapter,
            tuple(
                Episode(e.env_id, e.seed, tuple(heard(t, g.adapter) for t in e.turns), e.reward, e.stop, g.adapter)
                for e in g.episodes
            ),
        )
        for g in groups
    ]


def as_turn(request: Request, completion: Completion) -> Turn:
    return Turn(request.prompt_ids, completion.token_ids, completion.logprobs, completion.stop)
