"""Where samplers are made: the one place that chooses what turns requests into completions."""

from __future__ import annotations

from rl_lora.config import EpisodeConfig
from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled import CompiledLayers
from rl_lora.sampler.native import NativeSampler
from rl_lora.sampler.protocol import Sampler


def make_sampler(policy: Policy, config: EpisodeConfig, *, compile: bool = False) -> Sampler:
    """The sampler of a policy, with the limits of a configuration.

    `compile`: run decoding steps with compiled layers. `should_compile` decides, best before the policy is loaded.
    """
    return NativeSampler(
        policy,
        config.max_rows,
        max_cache_gib=config.max_cache_gib,
        check_every=config.check_every,
        compiled=CompiledLayers(policy) if compile else None,
    )
