"""Reward functions: pure functions `(completion, reference) -> float | Score`.

They know neither tokens nor tensors nor environments. `resolve` leads from a configuration to a function.
"""

from rewards.code import code_of
from rewards.combine import Part, WeightedSum
from rewards.format import format_match
from rewards.length import length_reward
from rewards.math import Outcome, Verdict, math_match, verify
from rewards.numeric import numeric_match
from rewards.registry import BUILTINS, RewardSpec, resolve
from rewards.score import RewardError, RewardFunction, Score, Unscorable, name_of, score

__all__ = [
    "BUILTINS",
    "Outcome",
    "Part",
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
    "name_of",
    "numeric_match",
    "resolve",
    "score",
    "verify",
]
