"""What the C++ is compiled for: vectors of either length run on any of its processors, long ones as two short ones."""

VECTORS = [(8, "-mno-avx512f"), (16, "-D__AVX512F__")]
"""Lanes, and what tells the compiler so."""
