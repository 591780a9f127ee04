"""The deltas of adapters, row by row: y += z B with z = x A^T, each row with ranks of its own.

A batch's adapters lie below one another, so that rows of one adapter, of several, and of none take the same time.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowDeltas:
    """What each of N rows adds to its product: z B with z = x A^T, over its own ranks."""

    A: Tensor
    """(K, >= in), in the compute dtype; the ranks of all adapters. A row is a number of whole panels."""
    B: Tensor
    """(K, >= out) with the scale in it; as A."""
    first: Tensor
    """int64 (N,): where a row's ranks begin."""
    count: Tensor
    """int64 (N,): how many they are; 0 for a row without an adapter."""
    most: int
    """No count is larger."""

    def turned(self) -> RowDeltas:
        """Those of the gradient with respect to x."""
        return RowDeltas(self.B, self.A, self.first, self.count, self.most)

    def call(self, x: Tensor, z: Tensor) -> array[int]:
        """`Deltas` in the C++. x: (N, ...), what they are added for or summed with; z: float32 (N, >= most).

        Raises ValueError if x has other rows than the deltas, or another dtype: the C++ would read what is not there.
        """
        if len(x) != len(self.first):
            raise ValueError(f"deltas of {len(self.first)} rows, but x has {len(x)}")
        if not x.dtype == self.A.dtype == self.B.dtype:
            raise ValueError(f"x is {x.dtype}, but A and B of the deltas are {self.A.dtype} and {self.B.dtype}")
        of = [self.A.data_ptr(), self.B.data_ptr(), self.A.stride(0), self.B.stride(0)]
        return array("q", [*of, self.first.data_ptr(), self.count.data_ptr(), z.data_ptr(), z.stride(0)])
