"""The settings that an evaluation takes from its adapters' runs unless they are given: `FROM_RUN` stands for them."""

from __future__ import annotations

from typing import Any

from rl_lora.config import TrainConfig
from rl_lora.settings.dotted import flatten

OF_RUN = {
    "env.id": "env.id",
    "env.kwargs": "env.kwargs",
    "env_kwargs": "eval.env_kwargs",
    "max_tokens": "rollout.max_tokens",
    "system_prompt": "rollout.system_prompt",
    "max_turns": "rollout.max_turns",
    "model.name": "model.name",
    "model.dtype": "model.dtype",
    "model.stop_tokens": "model.stop_tokens",
    "model.template_kwargs": "model.template_kwargs",
}
"""Options of an evaluation that a run answers, and where its config.yaml has them."""


def without_run() -> dict[str, Any]:
    """The values of these options where there is no run: the defaults of one."""
    defaults = flatten(TrainConfig())
    return {name: defaults[place] for name, place in OF_RUN.items()}
