"""The dtype that a machine computes in."""

from __future__ import annotations

import pytest
import torch

from rl_lora.system import dtype as dtype_module
from rl_lora.system.dtype import compute_dtype, seconds_of_product


@pytest.mark.parametrize(
    "avx512, amx, cost, expected",
    [
        (True, False, 0.4, torch.bfloat16),
        (False, True, 0.1, torch.bfloat16),
        (True, False, 0.9, torch.bfloat16),
        (True, False, 1.1, torch.float32),
        (True, False, 1.7, torch.float32),
        (False, False, 0.4, torch.float32),
    ],
)
def test_the_compute_dtype_is_bfloat16_where_the_cpu_multiplies_it_fast(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, cost: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(dtype_module, "seconds_of_product", lambda: {torch.bfloat16: cost, torch.float32: 1.0})
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == expected
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", torch.device("meta")) == torch.float32


def test_products_are_timed() -> None:
    assert 1e-6 < seconds_of_product()[torch.float32] < 1, "67 million multiplications and additions"


def test_the_compute_dtype_on_cuda_is_bfloat16_unless_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert compute_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
