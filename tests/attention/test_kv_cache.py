"""Rows that are decoded from the KV cache find what dense attention finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lora.attention import kv_cache
from rl_lora.attention.kv_cache import DecodeCache, KeyValues
from tests.attention.dense import OPTIONS, dense


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("short_prefix", [0, 4, 64])
@pytest.mark.parametrize(("D", "dtype"), [(5, torch.float32), (16, torch.float32), (16, torch.bfloat16)])
def test_rows_decode_what_a_dense_mask_gives_whatever_came_before(options, block, short_prefix, D, dtype, monkeypatch):
    """Rows come, read one or several tokens, leave, others come: all of them agree with dense attention each time.

    Heads of 16 are those of the C++, where it is there.
    """
    monkeypatch.setattr(kv_cache, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    H, H_kv = 4, 2
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.02, 0.02)

    def kv(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(H_kv, n, D, generator=g).to(dtype), torch.randn(H_kv, n, D, generator=g).to(dtype)

    def nodes(parts: list[tuple[Tensor, Tensor]]) -> KeyValues:
        lengths = np.array([part[0].shape[1] for part in parts])
        keys, values = torch.full((2, len(parts), H_kv, lengths.max(), D), 7.0, dtype=dtype)
        for i, (k, v) in enumerate(parts):
            keys[i, :, : lengths[i]], values[i, :, : lengths[i]] = k, v
        return KeyValues([keys], [values], lengths)

    prefixes = [kv(4), kv(6)]
    decode = DecodeCache("cpu", short_prefix=short_prefix)
    decode.prefixes = nodes(prefixes)
    decode.prefixes.append_empty()
    prefixes.append(kv(0))
    rows: list[tuple[Tensor, Tensor]] = []  # of each row, everything it has read

    def admit(prefix_of_prompt: list[int], prompt_of_row: list[int]) -> None:
        prompts = [kv(int(rng.integers(1, 6))) for _ in prefix_of_prompt]
        decode.admit(nodes(prompts), np.array(prefix_of_prompt), np.array(prompt_of_row))
        for p in prompt_of_row:
            pair = zip(prefixes[prefix_of_prompt[p]], prompts[p], strict=True)
            rows.append(tuple(torch.cat(x, 1) for x in pair))  # type: ignore[arg-type]

    def read(n: int, some: list[int] | None = None, lengths: list[int] | None = None) -> None:
        chosen = list(range(len(rows))) if some is None else some
        lengths = lengths or [n] * len(chosen)
        index = None if some is None else np.array(some)
        positions = decode.begin(n, index)
        q = torch.randn(len(chosen), H, n, D, generator=g).to(dtype)
        k, v = torch.randn(2, len(chosen), H_kv, n, D, generator=g).to(dtype)
        with torch.inference_mode():
            out = decode.attend(0, q, *decode.update(k, v, 0), options)
        decode.advance(np.array(lengths) if index is not None else n, index)
        for i, row in enumerate(chosen):
            m = lengths[i]
            rows[row] = torch.cat([rows[row][0], k[i, :, :m]], 1), torch.cat([rows[row][1], v[i, :, :m]], 1)
            keys, values = rows[row]
            at = torch.arange(keys.shape[1] - m, keys.shape[1])[:, None]
            j = torch.arange(keys.shape[1])
            mask = (j <= at) if options.window is None else (j <= at) & (at - j < options.window)
            expected = dense(q[i, :, :m].double(), keys.double(), values.double(), mask, options)
            assert positions[i, :m].tolist() == at[:, 0].tolist()
            torch.testing.assert_close(out[i, :, :m].double(), expected, atol=atol, rtol=rtol)

    def keep(which: list[int]) -> None:
        decode.keep(np.array(which, np.int64))
        rows[:] = [rows[i] for i in which]

    admit([0, 1], [0, 0, 1])
    read(1)
    read(1)
    keep([1, 2])
    admit([2, 0], [0, 1, 1])
    read(1)
    read(3, [0, 3], [3, 1])  # next turns of different lengths
    read(1)
    keep([0, 3])
    read(2)
    keep([])
    admit([1], [0])
    read(1)
