"""The one place that makes samplers, and so the one to choose them in."""

from __future__ import annotations

from rl_lora.config import EpisodeConfig
from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled import CompiledLayers
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Sampler


def make_sampler(policy: Policy, config: EpisodeConfig, *, compile: bool = False) -> Sampler:
    """The sampler of a policy, with the limits of a configuration.

    `compile`: run decode steps with compiled layers. `should_compile` decides, best before the policy is loaded.
    """
    return NativeSampler(
        policy,
        config.max_rows,
        max_cache_gib=config.max_cache_gib,
        check_every=config.check_every,
        compiled=CompiledLayers(policy) if compile else None,
    )
