"""The records that one stage hands to the next, from a model's reply to an optimizer step.

Frozen dataclasses without behaviour beyond what can be read off their fields. All is plain Python, without tensors, so
that a rollout can be looked at, stored or built by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Stop(StrEnum):
    """Why a reply, or an episode, ended."""

    END = "end"
    """The model ended its turn (a reply), or the environment terminated (an episode)."""
    LENGTH = "length"
    """Cut off: the token limit of a reply, the turn limit of an episode, or the context of the model was reached."""
    UNSCORABLE = "unscorable"
    """The verifier could not judge the episode. It is left out of its group and counted, never scored 0."""


@dataclass(frozen=True)
class Turn:
    """One reply of the model.

    `logprobs[t]` is the log-probability under which `completion_ids[t]` was sampled (the behaviour policy),
    temperature included. A stop token that was sampled is part of the completion: ending is learned too.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Stop
    text: str = ""

    def __post_init__(self) -> None:
        assert len(self.completion_ids) == len(self.logprobs)


@dataclass(frozen=True)
class Episode:
    """One play of an environment: the turns, and the environment's judgement of them.

    `success` is the environment's own verdict (`info["is_success"]`), `None` where it gives none; it is not derived
    from the reward, which may be shaped. `version` counts the optimizer steps of `adapter` before the episode was
    sampled.
    """

    env_id: str
    seed: int
    turns: tuple[Turn, ...]
    reward: float
    stop: Stop
    adapter: str | None = None
    version: int = 0
    success: bool | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    observations: tuple[str, ...] = ()
    answer: str | None = None
    """The answer that the environment found, in one spelling: equal answers are equal texts. None: it found none, or
    reports none."""
    unscorable: str | None = None
    """The reason why the episode could not be judged, where `stop` is UNSCORABLE."""
    failed: bool = False
    """Whether the reason is a fault of the task, such as an exception. Once the task is mended, the episode may be
    played again."""

    @property
    def n_tokens(self) -> int:
        """Tokens that the model wrote, over all turns."""
        return sum(len(turn.completion_ids) for turn in self.turns)

    @property
    def truncated(self) -> bool:
        """Whether the last reply or the episode itself was cut off."""
        return self.stop is Stop.LENGTH or (bool(self.turns) and self.turns[-1].stop is Stop.LENGTH)


@dataclass(frozen=True)
class Group:
    """Episodes of one problem (environment and seed) under one adapter; the unit over which a baseline is taken.

    Unscorable episodes are not in `episodes`; `n_unscorable` counts them, and `reasons` has the reason of each.
    """

    env_id: str
    seed: int
    adapter: str | None
    episodes: tuple[Episode, ...]
    n_unscorable: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepStats:
    """The figures of one optimizer step of one trainable. Means are over the tokens that were learned from."""

    adapter: str | None
    """Tag of the trainable."""
    version: int
    n_groups: int
    n_groups_learned: int
    n_tokens_learned: int
    loss: float | None
    entropy: float | None
    """Mean entropy of the next-token distribution at the sampling temperature, in nats."""
    sampler_learner_kl: float | None
    """Mean |log p_learner - log p_sampler|. None once a weight has moved since the tokens were sampled."""
    ratio_max: float | None
    clip_fraction: float | None
    grad_norm: float | None
    """Norm of the gradient before clipping; None where nothing was learned."""
    step_norm: float | None
    """Norm of the change of all weights together; None where nothing was learned."""
    norms: dict[str, float]
    """Norms of parts of the weights after the step; of an adapter, A_norm and B_norm, without the scale."""
    learning_rate: float
    n_layers_recomputed: int
    """Layers whose activations were computed again in the backward pass, in the micro-batch with the most."""
