"""Held-out problems: a stable hash of the problem decides, so that no seed, order or process can mix the two sides."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "eval")


def check_split(split: str) -> str:
    """`split` itself; raises ValueError unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    return split


def check_fraction(eval_fraction: float) -> None:
    """Raises ValueError unless this can be the share of problems that are held out."""
    if isinstance(eval_fraction, bool) or not isinstance(eval_fraction, int | float) or not 0 <= eval_fraction <= 1:
        raise ValueError(f"eval_fraction must be between 0 and 1, got {eval_fraction!r}")


def split_of(key: str, eval_fraction: float) -> str:
    """The split of the problem known as `key`: about `eval_fraction` of all keys are "eval", always the same ones."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") < eval_fraction * 2**64 else "train"
