"""Reward functions: `(completion, reference) -> float | Score`, or whatever else their parameters' names say.

They know neither tensors nor environments. `resolve` leads from a configuration to a function, `signature.py` says what
one may take, and `Judge` calls it.
"""

from rl_lora.rewards.background import Calls
from rl_lora.rewards.code import code_of, modules_of
from rl_lora.rewards.format import format_match
from rl_lora.rewards.judging import Judge, Part, WeightedSum, score
from rl_lora.rewards.length import length_reward
from rl_lora.rewards.math.verdict import Outcome, Verdict, math_match, verify
from rl_lora.rewards.numeric import numeric_match
from rl_lora.rewards.references import reference_fault
from rl_lora.rewards.registry import BUILTINS, RewardSpec, resolve
from rl_lora.rewards.score import Case, Messages, Reply, RewardError, RewardFunction, Score, Unscorable, name_of
from rl_lora.system.short_names import one_module

one_module(__name__)

__all__ = [
    "BUILTINS",
    "Calls",
    "Case",
    "Judge",
    "Messages",
    "Outcome",
    "Part",
    "Reply",
    "RewardError",
    "RewardFunction",
    "RewardSpec",
    "Score",
    "Unscorable",
    "Verdict",
    "WeightedSum",
    "code_of",
    "format_match",
    "length_reward",
    "math_match",
    "modules_of",
    "name_of",
    "numeric_match",
    "reference_fault",
    "resolve",
    "score",
    "verify",
]
