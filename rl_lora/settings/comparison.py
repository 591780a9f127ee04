"""What differs between the configuration of a resumed run and that of the run before."""

from __future__ import annotations

import json
import os
from typing import Any

from rl_lora.config import TrainConfig, without_module
from rl_lora.settings.dotted import as_typed, flatten
from rl_lora.system.model_names import canonical

MAY_DIFFER = {
    "run_dir",
    "steps",
    "resume",
    "model.compile",
    "eval.every",
    "checkpoint",
    "log",
    "rollout.max_rows",
    "rollout.max_cache_gib",
    "rollout.check_every",
    "rollout.max_failed",
    "rollout.reward_threads",
    "rollout.wait_for_steps",
    "learner.tokens_per_microbatch",
    "learner.max_activation_gib",
}
"""What a resumed run may change: nothing of it moves the adapter's path, but for the rounding of other batch shapes."""


def differences(config: TrainConfig, other: dict[str, Any]) -> list[str]:
    """What differs between a config and the flat record of another, apart from what may (`MAY_DIFFER`).

    An option that the other lacks, because an older version wrote it down, has its default there.
    """
    mine, defaults, other = (  # a tuple is a list, as on disk
        json.loads(json.dumps(flat)) for flat in (flatten(config), flatten(type(config)()), other)
    )
    theirs = defaults | other
    for name in ("model.name", "adapter.init_from"):  # older versions wrote ~ down as it was typed
        if isinstance(theirs[name], str):
            theirs[name] = os.path.expanduser(theirs[name])
    theirs["env.id"] = without_module(theirs["env.id"])
    if "model.name" in other:
        theirs["model.name"] = canonical(theirs["model.name"])
    return [
        f"{name}: {as_typed(theirs[name])} -> {as_typed(mine.get(name, 'no such option in this version'))}"
        for name in sorted(theirs)
        if (name not in mine or mine[name] != theirs[name]) and not ({name, name.partition(".")[0]} & MAY_DIFFER)
    ]
