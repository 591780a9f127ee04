"""What is trained is anything that offers weights, gradients and a state: learner and checkpoints ask no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rl_lora.config import LearnerConfig
from rl_lora.learner.learner import Learner
from rl_lora.learner.trainable import Trainable
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.policy.policy import Policy
from rl_lora.trainer.checkpoint import Checkpoints
from tests.learner.test_learner import LOOSE, of, problem, problems
from tests.oracles import gradient, relative_error, tiny_policy


class Norms:
    """The scales of the base's own normalisations: no adapter, and several tensors."""

    folder = "norms"
    tag = None

    def __init__(self, policy: Policy):
        self.version = 0
        self.weights = [p for name, p in policy.model.named_parameters() if "norm" in name]
        for weight in self.weights:
            weight.requires_grad_(True)

    def initialize(self, seed: int) -> None:
        pass

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def norms(self) -> dict[str, float]:
        return {"scale_norm": float(torch.cat(self.weights).detach().norm())}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(list(self.weights), folder / "scales.pt")

    def load(self, folder: Path) -> None:
        with torch.no_grad():
            for weight, saved in zip(self.weights, torch.load(folder / "scales.pt"), strict=True):
                weight.copy_(saved)


def flat(weights: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([weight.detach() for weight in weights]).clone()


def test_weights_of_the_base_are_learned_from_groups_without_an_adapter() -> None:
    policy = tiny_policy("llama")
    norms: Trainable = Norms(policy)
    adapter = policy.bank["a"].flat.detach().clone()
    groups = [problem(None, 4, [0.0, 1.0, 0.5]), *of("a", problems())]
    config = replace(LOOSE, learning_rate=0.01, tokens_per_microbatch=20)
    before = flat(list(norms.weights))
    (stats,) = Learner(policy, config, [norms]).step(groups)
    assert (stats.adapter, stats.version, norms.version, stats.n_groups) == (None, 1, 1, 1)
    assert stats.grad_norm == pytest.approx(float(torch.cat([gradient(w) for w in norms.weights]).norm()), rel=1e-5)
    assert stats.step_norm == pytest.approx(float((flat(list(norms.weights)) - before).norm()), rel=1e-5)
    assert stats.norms == norms.norms()
    assert torch.equal(policy.bank["a"].flat, adapter)


def test_the_gradient_of_the_bases_weights_is_that_of_the_formula() -> None:
    policy = tiny_policy("llama")
    norms, group = Norms(policy), problem(None, 4, [0.0, 1.0, 0.5])
    Learner(policy, LOOSE, [norms]).step([replace(group, episodes=group.episodes)])
    found = torch.cat([gradient(w) for w in norms.weights]).clone()
    other = tiny_policy("llama")
    twin = Norms(other)
    twin.zero_grad()
    n = sum(e.n_tokens for e in group.episodes)
    for e, a in zip(group.episodes, (-0.5, 0.5, 0.0), strict=True):
        (turn,) = e.turns
        ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
        logprobs = other.model(ids).logits[0].log_softmax(-1)[len(turn.prompt_ids) - 1 : -1]
        p = logprobs.gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]
        (-(torch.exp(p - torch.tensor(turn.logprobs)) * a).sum() / n).backward()
    assert relative_error(found, torch.cat([gradient(w) for w in twin.weights])) < 1e-4


def test_an_adapter_and_other_weights_learn_side_by_side_each_as_if_alone() -> None:
    policy = tiny_policy("llama")
    adapter, norms = TrainableAdapter(policy.bank, "a"), Norms(policy)
    config = replace(LOOSE, learning_rate=0.0001)
    groups = [problem(None, 4, [0.0, 1.0, 0.5]), *of("a", problems())]
    both = {stats.adapter: stats for stats in Learner(policy, config, [adapter, norms]).step(groups)}
    assert set(both) == {None, "a"}
    fresh = tiny_policy("llama")
    (alone,) = Learner(fresh, config, [TrainableAdapter(fresh.bank, "a")]).step(groups)
    assert both["a"].grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)


def test_a_checkpoint_keeps_and_restores_any_trainable_with_its_optimizer(tmp_path: Path) -> None:
    def learner_of(policy: Policy) -> tuple[Norms, Learner]:
        norms = Norms(policy)
        return norms, Learner(policy, LearnerConfig(learning_rate=0.01, max_sampler_learner_kl=100.0), [norms])

    groups = [problem(None, 4, [0.0, 1.0, 0.5])]
    norms, learner = learner_of(tiny_policy("llama"))
    learner.step(groups)
    saved = Checkpoints(tmp_path, 1).save(1, norms, learner.optimizer(norms), config={}, score=None)
    assert saved.damage() is None
    assert (saved.folder / "norms" / "scales.pt").exists()
    again, resumed = learner_of(tiny_policy("llama"))
    saved.restore(again, resumed.optimizer)
    assert again.version == 1
    assert torch.equal(flat(again.weights), flat(norms.weights))
    learner.step(groups)
    resumed.step(groups)
    assert torch.equal(flat(again.weights), flat(norms.weights)), "the optimizer's moments were not restored"
    (saved.folder / "norms" / "scales.pt").write_bytes(b"x")
    assert "scales.pt has" in (saved.damage() or "")
