"""Where the groups of a step come from: rollouts of the policy, or demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rl_lora.types import Group


class GroupSource(Protocol):
    """A source of groups. `rollout.worker.RolloutWorker` samples them, `rollout.demonstrations` reads them."""

    has_rewards: bool
    """Whether the rewards of its episodes say anything."""
    caption: str
    """Words before "step N" over a table of its episodes."""
    reward_seconds: float
    """Seconds that `collect` has waited for environments and their rewards."""

    def collect(
        self,
        seeds: Sequence[int],
        *,
        adapters: Sequence[str | None],
        n: int,
        random_seed: tuple[int, ...] = (0,),
        temperature: float = 1.0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """n episodes of every seed for every adapter; groups by adapter, then by seed. The same call gives the same."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...
