"""Settings that cannot be meant, found before anything is loaded."""

from __future__ import annotations

import math

from rl_lora.config import TrainConfig, advantage_of
from rl_lora.settings.dotted import as_typed


def validate(config: TrainConfig) -> None:
    """Raises ValueError with every number that cannot be meant."""
    c = config
    rules: list[tuple[str, float, bool, str]] = [
        ("steps", c.steps, c.steps >= 1, ">= 1"),
        ("seed", c.seed, 0 <= c.seed < 3000, "in 0 ... 2999"),
        ("adapter.rank", c.adapter.rank, c.adapter.rank >= 1, ">= 1"),
        ("adapter.alpha", c.adapter.alpha, 0 < c.adapter.alpha < math.inf, "> 0 and finite"),
        ("rollout.prompts_per_step", c.rollout.prompts_per_step, c.rollout.prompts_per_step >= 1, ">= 1"),
        ("rollout.group_size", c.rollout.group_size, c.rollout.group_size >= 1, ">= 1"),
        ("rollout.max_replaced", c.rollout.max_replaced, c.rollout.max_replaced >= 0, ">= 0"),
        (
            "rollout.curriculum_explore",
            c.rollout.curriculum_explore,
            0 <= c.rollout.curriculum_explore <= 1,
            "in [0, 1]",
        ),
        ("rollout.curriculum_half_life", c.rollout.curriculum_half_life, c.rollout.curriculum_half_life > 0, "> 0"),
        ("rollout.max_tokens", c.rollout.max_tokens, c.rollout.max_tokens >= 1, ">= 1"),
        (
            "rollout.overlong_tokens",
            c.rollout.overlong_tokens,
            0 <= c.rollout.overlong_tokens <= c.rollout.max_tokens,
            f">= 0 and <= rollout.max_tokens={c.rollout.max_tokens}",
        ),
        *[
            (f"rollout.{name}", weight, 0 <= weight < math.inf, ">= 0")
            for name, weight in (
                ("overlong_weight", c.rollout.overlong_weight),
                ("brevity_weight", c.rollout.brevity_weight),
            )
            if weight is not None
        ],
        (
            "rollout.temperature",
            c.rollout.temperature,
            c.rollout.temperature > 0,
            "> 0: a policy gradient needs samples",
        ),
        ("rollout.max_turns", c.rollout.max_turns, c.rollout.max_turns >= 1, ">= 1"),
        ("rollout.max_rows", c.rollout.max_rows, c.rollout.max_rows >= 1, ">= 1"),
        ("rollout.reward_threads", c.rollout.reward_threads, c.rollout.reward_threads >= 1, ">= 1"),
        *[
            (name, gib, gib >= 0, ">= 0 (GiB)")
            for name, gib in (
                ("rollout.max_cache_gib", c.rollout.max_cache_gib),
                ("learner.max_activation_gib", c.learner.max_activation_gib),
            )
            if gib is not None
        ],
        ("rollout.max_failed", c.rollout.max_failed, 0 <= c.rollout.max_failed <= 1, "in [0, 1]"),
        *[("rollout.check_every", n, n >= 1, ">= 1") for n in (c.rollout.check_every,) if n is not None],
        ("learner.learning_rate", c.learner.learning_rate, 0 < c.learner.learning_rate < math.inf, "> 0"),
        ("learner.weight_decay", c.learner.weight_decay, c.learner.weight_decay >= 0, ">= 0"),
        ("learner.max_grad_norm", c.learner.max_grad_norm, c.learner.max_grad_norm >= 0, ">= 0"),
        ("learner.clip_low", c.learner.clip_low, 0 <= c.learner.clip_low <= 1, "in [0, 1]"),
        ("learner.clip_high", c.learner.clip_high, c.learner.clip_high >= 0, ">= 0"),
        (
            "learner.updates_per_step",
            c.learner.updates_per_step,
            1 <= c.learner.updates_per_step <= c.rollout.prompts_per_step,
            f">= 1 and <= rollout.prompts_per_step={c.rollout.prompts_per_step}",
        ),
        (
            "learner.tokens_per_microbatch",
            c.learner.tokens_per_microbatch,
            c.learner.tokens_per_microbatch >= 1,
            ">= 1",
        ),
        (
            "learner.max_sampler_learner_kl",
            c.learner.max_sampler_learner_kl,
            c.learner.max_sampler_learner_kl > 0,
            "> 0",
        ),
        *[(f"learner.betas[{i}]", b, 0 <= b < 1, "in [0, 1)") for i, b in enumerate(c.learner.betas)],
        ("eval.every", c.eval.every, c.eval.every >= 0, ">= 0"),
        ("eval.episodes", c.eval.episodes, c.eval.episodes >= 0, ">= 0"),
        ("eval.temperature", c.eval.temperature, c.eval.temperature >= 0, ">= 0"),
        ("checkpoint.every", c.checkpoint.every, c.checkpoint.every >= 1, ">= 1"),
        ("checkpoint.keep", c.checkpoint.keep, c.checkpoint.keep >= 1, ">= 1"),
        ("log.samples_every", c.log.samples_every, c.log.samples_every >= 0, ">= 0"),
        ("log.samples_per_step", c.log.samples_per_step, c.log.samples_per_step >= 0, ">= 0"),
        ("log.samples_mib", c.log.samples_mib, c.log.samples_mib >= 0, ">= 0 (MiB)"),
    ]
    wrong = [f"{name} must be {rule}, got {value}" for name, value, holds, rule in rules if not holds]
    if c.learner.objective == "likelihood":
        if c.rollout.group_size != 1:
            wrong.append(f"rollout.group_size must be 1 for demonstrations, got {c.rollout.group_size}")
        if advantage_of(c.learner) != "none":
            wrong.append(f"learner.advantage must be none for demonstrations, got {as_typed(c.learner.advantage)}")
        if c.shuffle_rewards:
            wrong.append("shuffle_rewards has no meaning for demonstrations: they carry no rewards")
        if c.rollout.curriculum != "none":
            wrong.append("rollout.curriculum must be none for demonstrations: they neither succeed nor fail")
        if c.rollout.overlong_tokens or c.rollout.brevity_weight is not None:
            wrong.append("rollout.overlong_tokens and brevity_weight have no meaning for demonstrations")
    elif c.rollout.group_size == 1 and advantage_of(c.learner) != "none":
        wrong.append(
            f"rollout.group_size must be >= 2, got 1: with the {advantage_of(c.learner)} advantage a group of one has "
            "no signal; raise it, or set learner.advantage to none"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
