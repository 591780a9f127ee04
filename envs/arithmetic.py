"""Integer arithmetic on two operands: problems made from the seed, endless, with a held-out tenth."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np

from rl_lora.envs.split import check_split, split_of
from rl_lora.envs.templates import fill, placeholders
from rl_lora.envs.text import Problem, SingleTurnEnv
from rl_lora.rewards import RewardSpec

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EVAL_FRACTION = 0.1
MAX_DIGITS = 18
"""Operands are drawn as 64-bit integers."""


class ArithmeticEnv(SingleTurnEnv):
    """`rl_lora/Arithmetic-v0`: "What is 47 + 38? Reply with just the number."

    An operation, the number of digits of each operand and the operands are drawn uniformly from the seed, with
    replacement. A tenth of the problems is held out by a hash of the operation and the two operands without their
    order, so 47 + 38 and 38 + 47 are on the same side. Down to one digit, each operation has problems on both sides.

    Args:
        operations: any of "+", "-", "*".
        digits: of an operand: a number, or (low, high). Two digits are 10 to 99, one digit is 0 to 9.
        split: "train" or "eval"; the two share no problem, whatever the other arguments.
        reward: see `rewards.resolve`; the reference is the result, an int.
        template: the question; {a}, {op} and {b} stand for the problem.

    Raises:
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        operations: Sequence[str] = ("+",),
        digits: int | Sequence[int] = 2,
        split: str = "train",
        reward: RewardSpec = "numeric",
        template: str = "What is {a} {op} {b}? Reply with just the number.",
    ) -> None:
        super().__init__(reward)
        self.operations = _operation_names(operations)
        self.digits = _digit_range(digits)
        self.split = check_split(split)
        needed = {"a", "b"} if len(self.operations) == 1 else {"a", "op", "b"}
        if missing := needed - placeholders(template):
            raise ValueError(f"template must contain {{{'}, {'.join(sorted(missing))}}}, got {template!r}")
        self.template = template

    def problem(self, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        op = self.operations[rng.integers(len(self.operations))]
        while True:
            a, b = (self._operand(rng) for _ in range(2))
            if split_of(f"{op} {min(a, b)} {max(a, b)}", EVAL_FRACTION) == self.split:
                result = OPERATIONS[op](a, b)
                return Problem(fill(self.template, {"a": str(a), "op": op, "b": str(b)}), result, str(result))

    def _operand(self, rng: np.random.Generator) -> int:
        digits = int(rng.integers(self.digits[0], self.digits[1] + 1))
        low = 10 ** (digits - 1) if digits > 1 else 0
        return int(rng.integers(low, 10**digits))


def _operation_names(operations: Sequence[str]) -> tuple[str, ...]:
    names = tuple(operations) if isinstance(operations, Sequence) else ()
    known = all(isinstance(name, str) and name in OPERATIONS for name in names)
    if not names or not known or len(set(names)) < len(names):
        raise ValueError(f"operations must be some of '+', '-', '*', each once, got {operations!r}")
    return names


def _digit_range(digits: int | Sequence[int]) -> tuple[int, int]:
    bounds = (digits, digits) if isinstance(digits, int) else tuple(digits) if isinstance(digits, Sequence) else ()
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
    if len(bounds) != 2 or not whole or not 1 <= bounds[0] <= bounds[1] <= MAX_DIGITS:
        raise ValueError(f"digits must be a number from 1 to {MAX_DIGITS}, or (low, high) of such, got {digits!r}")
    return bounds
