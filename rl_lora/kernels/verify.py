"""Proof that a fast path is right: what it computes is compared with a reference before it is used.

A `FastPath` remembers the outcome. Where the comparison fails, that is said once, and the plain way does the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Mismatch(ValueError):
    """A fast path computes something else than its reference."""


class FastPath:
    """A faster way to a result, used as long as nothing speaks against it.

    Args:
        without: the warning where it is not used, e.g. "decoding goes on without recorded steps"; the reason follows.
        absent: errors that mean that this machine does not have it, which is no reason for a warning.
    """

    def __init__(self, without: str, absent: tuple[type[Exception], ...] = ()):
        self.without, self.absent = without, absent
        self.verified = False
        """Whether it has been compared with its reference, and found right."""
        self.failed: str | None = None
        """Why it is not used, once that is known."""

    def verify(self, check: Callable[[], object]) -> bool:
        """Whether it may be used. `check` raises where not, `Mismatch` for example; it is called once."""
        if not self.verified and self.failed is None:
            self.attempt(check)
            self.verified = self.failed is None
        return self.verified

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make` returns; None once it has raised, then and ever after."""
        if self.failed is None:
            try:
                return make()
            except Exception as error:  # whatever a compiler or a foreign model may raise: the plain way is right
                self.failed = reason_of(error)
                if not isinstance(error, self.absent):
                    warnings.warn(f"{self.without}: {self.failed}", stacklevel=3)
        return None


def reason_of(error: Exception) -> str:
    """The first line of an error, or of a compiler's first complaint in it, behind its type; a mismatch speaks for
    itself."""
    lines = str(error).strip().splitlines() or [""]
    line = next((line.strip() for line in lines if "error: " in line), lines[0])
    return line if isinstance(error, Mismatch) else f"{type(error).__name__}: {line}"


def require_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises `Mismatch` where the mean difference, in standard deviations of `expected`, is above the tolerance.

    what: the subject and the verb of the message, e.g. "its output differs from the plain one".
    """
    if not (gap := difference(found, expected)) <= tolerance:  # NaN is above all
        raise Mismatch(f"{what} by {gap:.2g} standard deviations")


def require_all_close(what: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Raises `Mismatch` where any difference is above the tolerance. exact: float64."""
    if not (error := float((found.double() - exact).abs().max())) <= tolerance:
        raise Mismatch(f"{what} by up to {error:.2g}, more than {tolerance:.2g}")


def difference(found: Tensor, expected: Tensor) -> float:
    """The mean difference in standard deviations of `expected`; NaN where either holds a NaN."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().mean() / expected.std().clamp_min(1e-9))
