"""Groups -> gradient -> one optimizer step for each trainable. The gradient is the only thing that processes exchange.

    maximise  sum_t weight_t objective_t / denominator        over all completion tokens of the step, of all processes

Weights and denominator are the objective's aggregation: 1 and the number of tokens for a mean over tokens. The
denominator is global, and counts groups without signal too: dropping them, splitting into other micro-batches, or
spreading over other numbers of processes, leaves the gradient as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rl_lora.config import LearnerConfig
from rl_lora.learner.advantages import advantages
from rl_lora.learner.batch import Batch
from rl_lora.learner.packing import pack
from rl_lora.learner.recompute import Recompute
from rl_lora.learner.trainable import Trainable
from rl_lora.lora.trainable_adapter import TrainableAdapter
from rl_lora.policy.policy import Policy
from rl_lora.settings.algorithm import advantage_of, objective_of, objective_options
from rl_lora.system.memory import budget
from rl_lora.types import Group, StepStats


class SamplerLearnerMismatch(FloatingPointError):
    """Sampler and learner disagree about the policy's probabilities."""


class Learner:
    """AdamW over trainables, fed with groups.

    Args:
        trainables: by default all adapters of the policy's bank. Groups with the tag of none of them are left out.
        temperature: at which the groups were sampled.
        accelerator: sums gradients and counts over its processes. None is a single process.
    """

    def __init__(
        self,
        policy: Policy,
        config: LearnerConfig,
        trainables: Sequence[Trainable] | None = None,
        *,
        temperature: float = 1.0,
        accelerator: Accelerator | None = None,
    ):
        self.policy, self.config, self.temperature, self.accelerator = policy, config, temperature, accelerator
        self.trainables = None if trainables is None else {trainable.tag: trainable for trainable in trainables}
        self.optimizers: dict[str | None, torch.optim.AdamW] = {}
        self.objective, self.options = objective_of(config), objective_options(config)
        self.recompute = Recompute(policy, budget(config.max_activation_gib, policy.device))

    def trainable(self, tag: str | None) -> Trainable | None:
        """What groups of this tag train, if anything."""
        if self.trainables is not None:
            return self.trainables.get(tag)
        return None if tag is None else TrainableAdapter(self.policy.bank, tag)

    def optimizer(self, trainable: Trainable) -> torch.optim.AdamW:
        """The trainable's own optimizer; made at its first step."""
        if trainable.tag not in self.optimizers:
            self.optimizers[trainable.tag] = torch.optim.AdamW(
                list(trainable.weights),
                lr=self.config.learning_rate,
                betas=self.config.betas,
                weight_decay=self.config.weight_decay,
            )
        return self.optimizers[trainable.tag]

    def step(
        self,
        groups: Sequence[Group],
        on_tokens: Callable[[int], None] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> list[StepStats]:
        """Learn from the groups of this process: `updates_per_step` optimizer steps of every trainable in them.

        All processes must hold groups of the same tags. `on_tokens` is told how many tokens were learned from.
        `before_update` is called before anything moves, in every update.

        Returns one record for each update and trainable, over all processes.

        Raises:
            SamplerLearnerMismatch: before anything has moved, see `LearnerConfig.max_sampler_learner_kl`.
        """
        n = self.config.updates_per_step
        steps: list[StepStats] = []
        for i in range(n):
            # Nothing has moved since the rollout.
            on_policy = self.objective.needs_samples and all(stats.grad_norm is None for stats in steps)
            steps += self._update(groups[i::n], on_policy, on_tokens, before_update)
        return steps

    def _update(
        self,
        groups: Sequence[Group],
        on_policy: bool,
        on_tokens: Callable[[int], None] | None,
        before_update: Callable[[], None] | None,
    ) -> list[StepStats]:
        tags = sorted({group.adapter for group in groups}, key=lambda tag: tag or "")
        trained = {tag: trainable for tag in tags if (trainable := self.trainable(tag)) is not None}
        share = self.objective.aggregation.share
        counts = self._sum([[_n_groups(groups, tag), _shares(groups, tag, share)] for tag in trained])
        denominators = {tag: shares for tag, (_, shares) in zip(trained, counts, strict=True)}
        estimator = advantage_of(self.config)
        signal = [
            (group, advantages_G)
            for group in groups
            if group.adapter in trained and (advantages_G := advantages(group, estimator)) is not None
        ]
        n_learned = self._sum([[_n_groups([group for group, _ in signal], tag)] for tag in trained])
        for trainable in trained.values():
            trainable.zero_grad()
        tallies = {tag: _Tally(self.policy.device) for tag in trained}
        n_recomputed = 0
        for batch in pack(
            signal,
            denominators=denominators,
            tokens_per_microbatch=self.config.tokens_per_microbatch,
            aggregation=self.objective.aggregation,
            shared_prefix=self.policy.not_shared is None,
            device=self.policy.device,
        ):
            n_recomputed = max(n_recomputed, self._accumulate(batch, tallies))
            if on_tokens is not None:
                on_tokens(len(batch.targets))
        for tally in tallies.values():
            tally.reduce(self.accelerator)
            if on_policy:
                self._check_agreement(tally)
        norms = [
            self._reduce_gradient(trainable) if n_signal else None
            for trainable, (n_signal,) in zip(trained.values(), n_learned, strict=True)
        ]
        if before_update is not None:
            before_update()
        return [  # only now does anything move
            self._finish(trainable, tallies[tag], int(n_groups), int(n_signal), norm, on_policy, n_recomputed)
            for (tag, trainable), (n_groups, _), (n_signal,), norm in zip(
                trained.items(), counts, n_learned, norms, strict=True
            )
        ]

    def _accumulate(self, batch: Batch, tallies: dict[str | None, _Tally]) -> int:
        """One forward and backward pass; the gradient adds up in the `grad` of all weights.

        Returns how many layers were computed twice.
        """
        recompute = self.recompute.layers(batch.tokens.numel(), next(iter(tallies)))
        logprobs, entropy = target_logprobs(self.policy, batch, self.temperature, recompute)
        objective, clipped = self.objective(logprobs, batch.behaviour_logprobs, batch.advantages, **self.options)
        loss = -(objective * batch.weights)  # (N,)
        loss.sum().backward()
        entry = batch.index // (batch.tokens.numel() // len(batch.adapters))  # (N,): the entry of each target
        for tag, tally in tallies.items():
            mine = torch.tensor([adapter == tag for adapter in batch.adapters], device=entry.device)[entry]
            tally.add(loss, logprobs.detach() - batch.behaviour_logprobs, entropy, clipped, mine)
        return len(recompute)

    def _check_agreement(self, tally: _Tally) -> None:
        kl = tally.mean(tally.difference)
        if kl is not None and not kl <= self.config.max_sampler_learner_kl:
            raise SamplerLearnerMismatch(
                f"sampler and learner disagree: mean |log p_learner - log p_sampler| is {kl:.3g}, the bound is "
                f"learner.max_sampler_learner_kl={self.config.max_sampler_learner_kl:g}. Try --model.dtype float32; if "
                "the value stays, the sampler does not run the policy that is trained"
            )

    def _reduce_gradient(self, trainable: Trainable) -> float:
        """Add up the processes' gradients of a trainable; their norm."""
        grads = [_grad(weight) for weight in trainable.weights]
        if self.accelerator is not None:
            for grad in grads:
                grad.copy_(self.accelerator.reduce(grad, reduction="sum"))
        norm = math.hypot(*(float(grad.norm()) for grad in grads))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of adapter {trainable.tag!r} is {norm}; no step was taken")
        return norm

    def _finish(
        self,
        trainable: Trainable,
        tally: _Tally,
        n_groups: int,
        n_learned: int,
        grad_norm: float | None,
        on_policy: bool,
        n_recomputed: int,
    ) -> StepStats:
        """Clip the gradient and take the step; without any signal (no norm) nothing moves, momentum included."""
        step_norm = None
        if grad_norm is not None:
            weights = trainable.weights
            before = [weight.detach().clone() for weight in weights]
            if 0 < self.config.max_grad_norm < grad_norm:
                for weight in weights:
                    _grad(weight).mul_(self.config.max_grad_norm / grad_norm)
            self.optimizer(trainable).step()
            trainable.version += 1
            changes = (weight.detach() - old for weight, old in zip(weights, before, strict=True))
            step_norm = math.hypot(*(float(change.norm()) for change in changes))
        return StepStats(
            adapter=trainable.tag,
            version=trainable.version,
            n_groups=n_groups,
            n_groups_learned=n_learned,
            n_tokens_learned=round(tally.n),
            loss=tally.loss if tally.n else None,
            entropy=tally.mean(tally.entropy),
            sampler_learner_kl=tally.mean(tally.difference) if on_policy else None,
            ratio_max=tally.ratio_max if tally.n and self.objective.needs_samples else None,
            clip_fraction=tally.mean(tally.clipped),
            grad_norm=grad_norm,
            step_norm=step_norm,
            norms=trainable.norms(),
            learning_rate=self.config.learning_rate,
            n_layers_recomputed=n_recomputed,
        )

    def _sum(self, counts: list[list[float]]) -> list[list[float]]:
        """Add the counts of all processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1 or not counts:
            return counts
        tensor = torch.tensor(counts, dtype=torch.float64, device=self.policy.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()


def target_logprobs(
    policy: Policy, batch: Batch, temperature: float = 1.0, recompute: Sequence[nn.Module] = ()
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target of a batch, and the entropy of its distribution: float32 (N,), (N,).

    `recompute`: layers that the backward pass computes again.
    """
    positions = None if batch.tree is None else batch.tree.positions
    hidden = policy.hidden(batch.tokens, batch.adapters, batch.tree, positions, recompute=recompute)
    return policy.head.logprobs(hidden.flatten(0, 1)[batch.index], batch.targets, temperature)


def _grad(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _n_groups(groups: Sequence[Group], tag: str | None) -> int:
    return sum(group.adapter == tag for group in groups)


def _shares(groups: Sequence[Group], tag: str | None, share: Callable[[int], float]) -> float:
    """What the episodes add to the denominator."""
    return sum(share(episode.n_tokens) for group in groups if group.adapter == tag for episode in group.episodes)


class _Tally:
    """Sums over the tokens that one trainable learns from; on the device until `reduce`."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, device=device)
        self.max = torch.zeros(1, device=device)
        self.n = self.loss = self.difference = self.entropy = self.clipped = self.ratio_max = 0.0

    def add(self, loss: Tensor, difference: Tensor, entropy: Tensor, clipped: Tensor | None, mine: Tensor) -> None:
        cut = torch.zeros_like(entropy) if clipped is None else clipped.float()
        columns = [torch.ones_like(entropy), loss.detach(), difference.abs(), entropy, cut]
        self.sums += torch.stack(columns, 1)[mine].sum(0)
        self.max = torch.maximum(self.max, torch.exp(difference[mine]).amax().nan_to_num() if mine.any() else self.max)

    def reduce(self, accelerator: Accelerator | None) -> None:
        """Add up the processes, and read the sums."""
        if accelerator is not None:
            self.sums, self.max = accelerator.reduce(self.sums, reduction="sum"), accelerator.gather(self.max)
        self.n, self.loss, self.difference, self.entropy, self.clipped = self.sums.tolist()
        self.ratio_max = float(self.max.max())

    def mean(self, total: float) -> float | None:
        return total / self.n if self.n else None
