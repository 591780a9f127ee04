"""Samples: an episode as one flat record, as JSON holds it."""

from __future__ import annotations

import hashlib
from typing import Any

from rl_lora.system import finite_json as json
from rl_lora.types import Episode, Stop

Sample = dict[str, Any]


def sample_of(episode: Episode, k: int = 0, **more: Any) -> Sample:
    """One flat record of an episode, as JSON holds it: sample number k of its problem."""
    return {
        "adapter": episode.adapter,
        "env": episode.env_id,
        "seed": episode.seed,
        "k": k,
        "observations": list(episode.observations),
        "completions": [turn.text for turn in episode.turns],
        "answer": episode.answer,
        "reward": episode.reward,
        "reward_parts": episode.reward_parts,
        "success": episode.success,
        "stop": str(episode.stop),
        "truncated": episode.truncated,
        "unscorable": episode.stop is Stop.UNSCORABLE,
        "reason": episode.unscorable,
        "failed": episode.failed,
        "tokens": episode.n_tokens,
        **more,
    }


def content_hash(*parts: Any) -> str:
    """64 bits of SHA-256 over JSON-like data, as 16 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
