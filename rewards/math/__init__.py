"""Mathematics: the extraction and comparison of answers as a reward."""

from rl_lora.rewards.math.verdict import Outcome, Verdict, math_match, verify

__all__ = ["Outcome", "Verdict", "math_match", "verify"]
