"""Attention of query blocks to keys that several of them share.

    out = softmax(scaling * q [k_1 ... k_S]^T + mask) [v_1 ... v_S]

The S sources of keys are stored once: a prefix that prompts share, a prompt, a row's own suffix. All blocks
that share a source meet it in one matrix product. Which blocks share what is a layout's business (`tree.py`,
`kv_cache.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lora.kernels.attention_options import AttentionOptions


class Sharing:
    """Which of n nodes each of B query blocks belongs to; brings the blocks of a node together, (n, G) places.

    It is computed on the host: nothing here waits for a device.
    """

    def __init__(self, owner: np.ndarray, n: int, device: torch.device | str = "cpu"):
        counts = np.bincount(owner, minlength=n)
        self.n, self.G = n, int(counts.max(initial=1))
        order = np.argsort(owner, kind="stable")
        place = np.empty_like(owner)
        place[order] = owner[order] * self.G + np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[order]]
        self.regular = len(owner) == n * self.G and bool((place == np.arange(len(owner))).all())
        block = np.full(n * self.G, len(owner))
        block[place] = np.arange(len(owner))
        empty = block == len(owner)
        self._empty = torch.from_numpy(np.flatnonzero(empty)).to(device)
        self.blocks = torch.from_numpy(np.where(empty, 0, block).reshape(n, self.G)).to(device)
        """int64 (n, G): the block of each place; empty places have any."""
        self.place = torch.from_numpy(place).to(device)
        """int64 (B,)"""

    @functools.cached_property
    def owner(self) -> Tensor:
        """int64 (B,): the node of each block."""
        return self.place // self.blocks.shape[1]

    @functools.cached_property
    def wide(self) -> tuple[Tensor, Tensor]:
        """`blocks` and `place` with two places a node at least: a program for many blocks then does for one as well."""
        if self.G > 1:
            return self.blocks, self.place
        return self.blocks.expand(-1, 2).contiguous(), 2 * self.place

    @classmethod
    def of(cls, blocks: Tensor, place: Tensor) -> Sharing:
        """From its tensors alone: it is taken for irregular, and its empty places are unknown."""
        sharing = cls.__new__(cls)
        (sharing.n, sharing.G), sharing.regular = blocks.shape, False
        sharing.blocks, sharing.place, sharing._empty = blocks, place, place[:0]
        return sharing

    def together(self, x: Tensor, *, zero: bool = False) -> Tensor:
        """(B, h, X, Y) -> (n, h, G * X, Y). Empty places hold anything, or zeros where those are asked for."""
        if not self.regular:
            x = x[self.blocks.flatten()]
            if zero and len(self._empty):
                x[self._empty] = 0
        if self.G == 1:
            return x
        _, h, X, Y = x.shape
        return x.reshape(self.n, self.G, h, X, Y).transpose(1, 2).reshape(self.n, h, self.G * X, Y)

    def apart(self, x: Tensor) -> Tensor:
        """(n, h, G * X, Y) -> (B, h, X, Y): the inverse of `together`."""
        if self.G > 1:
            n, h, GX, Y = x.shape
            x = x.reshape(n, h, self.G, GX // self.G, Y).transpose(1, 2).reshape(n * self.G, h, -1, Y)
        return x if self.regular else x[self.place]


@dataclass(frozen=True)
class KeySource:
    """Keys and values of n nodes, (n, H_kv, L, D); block b attends to node b where there is no sharing."""

    key: Tensor
    value: Tensor
    sharing: Sharing | None = None

    def together(self, x: Tensor, *, zero: bool = False) -> Tensor:
        return x if self.sharing is None else self.sharing.together(x, zero=zero)

    def apart(self, x: Tensor) -> Tensor:
        return x if self.sharing is None else self.sharing.apart(x)


def attend_to_sources(query: Tensor, sources: Sequence[KeySource], mask: Tensor, options: AttentionOptions) -> Tensor:
    """query: (B, H, Q, D). mask: float32, broadcast to (B, 1, Q, all keys), 0 or -inf. Returns (B, H, Q, D).

    Query heads outnumber key-value heads; those of one key-value head are rows of one product.
    """
    q = _grouped(query, sources)
    p = _probabilities(q, sources, mask, options, query.shape)[0].to(query.dtype).view(*q.shape[:3], -1)
    return _weighted(p, sources, lambda source: source.value).reshape(*query.shape[:3], -1)


def attend_to_sources_backward(
    query: Tensor, sources: Sequence[KeySource], mask: Tensor, options: AttentionOptions, grad: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of `attend_to_sources`: with respect to the query, and to each source's key and value.

    The probabilities are computed anew, so that a forward pass keeps nothing of size Q x keys.
    """
    q, g = _grouped(query, sources), _grouped(grad, sources)
    p, slope = _probabilities(q, sources, mask, options, query.shape)
    ds = _scores(g, sources, lambda source: source.value).reshape(p.shape).float()  # d loss / d p
    ds = ds.sub((p * ds).sum(-1, keepdim=True)).mul_(p).mul_(options.scaling)
    if slope is not None:
        ds.mul_(slope)
    ds, p = (x.to(query.dtype).view(*q.shape[:3], -1) for x in (ds, p))
    of_sources = []
    for source, ds_s, p_s in zip(sources, _split(ds, sources), _split(p, sources), strict=True):
        dkey = source.together(ds_s, zero=True).transpose(-1, -2) @ source.together(q)
        dvalue = source.together(p_s, zero=True).transpose(-1, -2) @ source.together(g)
        of_sources.append((dkey, dvalue))
    return _weighted(ds, sources, lambda source: source.key).reshape(query.shape), of_sources


def _grouped(x: Tensor, sources: Sequence[KeySource]) -> Tensor:
    """(B, H, Q, D) -> (B, H_kv, H / H_kv * Q, D)"""
    return x.reshape(x.shape[0], sources[0].key.shape[1], -1, x.shape[-1])


def _split(x: Tensor, sources: Sequence[KeySource]) -> Sequence[Tensor]:
    return x.split([source.key.shape[2] for source in sources], -1) if len(sources) > 1 else [x]


def _scores(q: Tensor, sources: Sequence[KeySource], of: Any) -> Tensor:
    """(B, H_kv, X, D) -> (B, H_kv, X, all keys)"""
    scores = [source.apart(source.together(q) @ of(source).transpose(-1, -2)) for source in sources]
    return torch.cat(scores, -1) if len(scores) > 1 else scores[0]


def _weighted(p: Tensor, sources: Sequence[KeySource], of: Any) -> Tensor:
    """(B, H_kv, X, all keys) -> (B, H_kv, X, D)"""
    parts = [
        source.apart(source.together(p_s) @ of(source)) for source, p_s in zip(sources, _split(p, sources), strict=True)
    ]
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def _probabilities(
    q: Tensor, sources: Sequence[KeySource], mask: Tensor, options: AttentionOptions, shape: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """float32 (B, H, Q, all keys), and the slope of the soft cap where there is one."""
    scores = _scores(q, sources, lambda source: source.key).reshape(*shape[:3], -1)
    slope = None
    if options.softcap is None:
        scores = torch.add(mask, scores, alpha=options.scaling)  # one pass: to float32, scaled, masked
    else:
        capped = torch.tanh(scores.float() * (options.scaling / options.softcap))
        slope = 1 - capped * capped
        scores = torch.add(mask, capped, alpha=options.softcap)
    if options.sinks is None:
        return torch.softmax(scores, -1), slope
    sinks = options.sinks.float()[..., None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1], slope


def additive(allowed: Tensor) -> Tensor:
    """bool (B, Q, K) -> float32 (B, 1, Q, K), as `attend_to_sources` wants its mask."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)[:, None]
