"""Text environments for gymnasium. Importing this registers their ids.

`gymnasium.make("envs:rl_lora/Arithmetic-v0", digits=3)` imports it first.
"""

import gymnasium as gym

from rl_lora.envs.text import Problem, SingleTurnEnv, TextEnv, TextSpace, judge
from rl_lora.system.short_names import one_module

one_module(__name__)

__all__ = ["Problem", "SingleTurnEnv", "TextEnv", "TextSpace", "judge"]

_ENVS = {
    "rl_lora/Arithmetic-v0": "rl_lora.envs.arithmetic:ArithmeticEnv",
    "rl_lora/Math-v0": "rl_lora.envs.math:MathEnv",
    "rl_lora/Prompts-v0": "rl_lora.envs.prompts:PromptsEnv",
    "rl_lora/ReasoningGym-v0": "rl_lora.envs.reasoning_gym:ReasoningGymEnv",
}

for _id, _entry_point in _ENVS.items():
    if _id not in gym.registry:
        gym.register(id=_id, entry_point=_entry_point)
