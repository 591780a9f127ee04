"""Layers that are computed twice: less is kept, and the gradient is the same to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from rl_lora.config import LearnerConfig, TrainConfig
from rl_lora.learner.learner import Learner
from rl_lora.learner.recompute import Recompute, activation_bytes
from rl_lora.lora.adapter import Adapter
from rl_lora.policy.hooks import layers_of
from rl_lora.policy.policy import Policy
from rl_lora.settings.validation import validate
from rl_lora.system import memory
from rl_lora.system.memory import budget, free_bytes
from rl_lora.types import Group
from tests.oracles import episode, group, tiny_policy, turn
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, randomize, tiny_tokenizer, token_ids

LOOSE = LearnerConfig(max_sampler_learner_kl=100.0, tokens_per_microbatch=64)


def problems() -> list[Group]:
    """Two adapters, replies of several lengths, several micro-batches."""
    found = []
    for i, adapter in enumerate(["a", "b", "a"]):
        prompt = token_ids(1, 6 + i, i)[0].tolist()
        replies = [turn(prompt, n, seed=10 * i + n) for n in (1, 9, 4)]
        found.append(group(*(episode(t, reward=k, adapter=adapter) for k, t in enumerate(replies)), adapter=adapter))
    return found


def gradients(policy: Policy, gib: float) -> tuple[list[Tensor], int]:
    """Of one step from the same weights, and how many layers were computed twice."""
    before = {name: adapter.flat.detach().clone() for name, adapter in policy.bank.adapters.items()}
    stats = Learner(policy, replace(LOOSE, max_activation_gib=gib)).step(problems())
    found = [adapter.flat.grad.clone() for adapter in policy.bank.adapters.values() if adapter.flat.grad is not None]
    with torch.no_grad():
        for name, adapter in policy.bank.adapters.items():
            adapter.flat.copy_(before[name])
    return found, max(s.n_layers_recomputed for s in stats)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gradient_is_the_same_to_the_bit(arch: str) -> None:
    policy = tiny_policy(arch, ["a", "b"])
    kept, none = gradients(policy, 1.0)
    recomputed, all_layers = gradients(policy, 0.0)
    assert (none, all_layers) == (0, len(layers_of(policy.backbone)))
    assert len(kept) == 2
    for a, b in zip(kept, recomputed, strict=True):
        assert a.norm() > 0
        assert torch.equal(a, b)
    assert all("forward" not in layer.__dict__ for layer in layers_of(policy.backbone))


def test_on_the_plain_path_too() -> None:
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4)
    policy = Policy(MambaForCausalLM(config), tiny_tokenizer(chat_template=False))
    assert policy.not_shared
    for i, name in enumerate("ab"):
        randomize(policy.bank.add(name), i)
    (kept, none), (recomputed, all_layers) = gradients(policy, 1.0), gradients(policy, 0.0)
    assert (none, all_layers) == (0, 2)
    assert all(map(torch.equal, kept, recomputed))


def kept_bytes(policy: Policy, n_tokens: int, max_bytes: float) -> int:
    """What the layers of one pass keep, as autograd tells it."""
    layers = Recompute(policy, max_bytes).layers(n_tokens, "a")
    weights = (*policy.model.parameters(), *policy.model.buffers(), policy.bank["a"].flat)
    seen = {weight.untyped_storage().data_ptr() for weight in weights}
    alive: list[Any] = []
    total = 0

    def count(x: Tensor) -> Tensor:
        nonlocal total
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            alive.append(x)
            total += x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        policy.hidden(token_ids(1, n_tokens), ["a"], recompute=layers)
    return total


def test_what_is_kept_stays_within_the_budget() -> None:
    policy = tiny_policy("llama")
    n = 128
    everything = kept_bytes(policy, n, float("inf"))
    nothing = kept_bytes(policy, n, 0)
    assert nothing < everything / 3
    assert everything == pytest.approx(n * sum(activation_bytes(policy, "a")), rel=0.25)
    budget_bytes = (everything + nothing) / 2
    assert nothing < kept_bytes(policy, n, budget_bytes) < 1.1 * budget_bytes
    lower, upper = layers_of(policy.backbone)
    assert Recompute(policy, budget_bytes).layers(n, "a") == [lower]
    assert Recompute(policy, 0).layers(n, "a") == [lower, upper]


def test_layers_below_the_lowest_adapter_are_not_computed_twice() -> None:
    policy = tiny_policy("llama", [])
    policy.bank.add("a", targets=["layers.1.self_attn.q_proj"])
    _lower, upper = layers_of(policy.backbone)
    below, above = activation_bytes(policy, "a")
    assert below == 0 < above
    assert Recompute(policy, 0).layers(10, "a") == [upper]


def test_another_librarys_forward_stays_in_place() -> None:
    policy = tiny_policy("llama", ["a", "b"])
    layer = layers_of(policy.backbone)[0]
    calls = []
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = forward
    gradients(policy, 0.0)
    assert layer.forward is forward
    assert calls


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert budget(0.5, cpu) == 2**29
    assert budget(0, cpu) == 0
    total = psutil.virtual_memory().total
    assert 0 < budget(None, cpu) < total / 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(cpu) - memory.kept_bytes() < total / 4


@pytest.mark.parametrize("room", ["rollout", "learner"])
def test_a_negative_budget_is_refused(room: str) -> None:
    config = TrainConfig(run_dir="runs/x")
    name = {"rollout": "max_cache_gib", "learner": "max_activation_gib"}[room]
    setattr(getattr(config, room), name, -1.0)
    with pytest.raises(ValueError, match=rf"{room}.{name} must be >= 0 \(GiB\), got -1.0"):
        validate(config)
    config = TrainConfig(run_dir="runs/x")
    config.rollout.check_every = 0
    with pytest.raises(ValueError, match=r"rollout.check_every must be >= 1, got 0"):
        validate(config)


def test_an_adapter_that_was_measured_is_left_as_it_was() -> None:
    policy = tiny_policy("llama")
    adapter: Adapter = policy.bank["a"]
    before = adapter.hash()
    activation_bytes(policy, "a")
    assert adapter.hash() == before
    assert adapter.flat.grad is None
