"""Reward functions: `(completion, reference) -> float | Score`, or whatever else their parameters' names say.

They know neither tensors nor environments. `resolve` leads from a configuration to a function, `signature.py` says what
one may take, and `Judge` calls it.
"""

from rewards.background import Calls
from rewards.code import code_of, modules_of
from rewards.combine import Part, WeightedSum
from rewards.format import format_match
from rewards.judging import Judge, score
from rewards.length import length_reward
from rewards.math import Outcome, Verdict, math_match, verify
from rewards.numeric import numeric_match
from rewards.references import reference_fault
from rewards.registry import BUILTINS, RewardSpec, resolve
from rewards.score import Case, Messages, Reply, RewardError, RewardFunction, Score, Unscorable, name_of

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
