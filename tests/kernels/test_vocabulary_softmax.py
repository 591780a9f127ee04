"""The softmax over the vocabulary in C++ against float64: draws, log-probabilities, gradients; rows are their own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lora.kernels import native_code, vocabulary_softmax
from rl_lora.kernels.native_code import dispatched
from rl_lora.kernels.vocabulary_softmax import draw, library, token_logprobs
from tests.vectors import VECTORS

DTYPES = [torch.float32, torch.bfloat16]
BUILDS = [*(flag for _, flag in VECTORS), "-mno-avx512bf16", "-march=haswell"]
needs_ours = pytest.mark.skipif(library(torch.float32) is None, reason="GCC, and AVX2 or AVX-512 are not here")


def logits_of(dtype: torch.dtype, R: int, V: int) -> Tensor:
    return (3 * torch.randn(R, V, generator=torch.Generator().manual_seed(V))).to(dtype)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


@needs_ours
@pytest.mark.parametrize("build", BUILDS)
def test_builds_for_other_processors_are_right(
    build: str, fresh_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both dtypes: `library` compares with float64."""
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, build])
    for dtype in DTYPES:
        assert library(dtype) is not None


@needs_ours
@pytest.mark.parametrize(("function", "dtype"), [("_draw_with", torch.float32), ("_token_logprobs", torch.bfloat16)])
def test_code_that_computes_something_else_is_not_used(
    function: str, dtype: torch.dtype, fresh_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(found: ctypes.CDLL, projected: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(projected), dtype=torch.int64), torch.zeros(len(projected))

    monkeypatch.setattr(vocabulary_softmax, function, wrong)
    with pytest.warns(UserWarning, match=r"left to torch: in C\+\+ "):
        assert library(dtype) is None


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 37, 1024, 2500])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(V: int, dtype: torch.dtype) -> None:
    """To the bit, with rows that lie apart, and nothing between them is written to."""
    R = 9
    wide = torch.full((R, V + 5), torch.nan, dtype=dtype)
    wide[:, :V] = logits_of(dtype, R, V)
    uniforms, temperature = torch.linspace(0, 0.999, R), torch.tensor([1.0, 0.0, 0.6] * 3)
    targets, before = torch.arange(R) % V, torch.get_num_threads()
    tokens, logprobs = draw(wide[:, :V], temperature, uniforms)
    written = wide.clone()
    scores = token_logprobs(written[:, :V], targets, 0.8, 0.9, 5.0, gradient=True)
    assert written[:, V:].isnan().all()
    assert logprobs.isfinite().all()
    try:
        for threads, start, end in ((1, 0, 9), (2, 3, 9), (5, 4, 5)):
            torch.set_num_threads(threads)
            rows = slice(start, end)
            apart = wide[rows, :V].contiguous()
            again = draw(apart, temperature[rows], uniforms[rows])
            assert torch.equal(again[0], tokens[rows])
            assert torch.equal(again[1], logprobs[rows])
            for ours, whole in zip(
                token_logprobs(apart, targets[rows], 0.8, 0.9, 5.0, gradient=True), scores, strict=True
            ):
                assert torch.equal(ours, whole[rows])
            assert torch.equal(apart, written[rows, :V])
    finally:
        torch.set_num_threads(before)


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite(dtype: torch.dtype) -> None:
    """NaN and infinite logits are found out by their log-probability; tokens of -inf have none."""
    for wrong in (torch.nan, torch.inf, -torch.inf):
        logits = logits_of(dtype, 3, 2700)
        logits[0] = wrong
        logits[1, 2600] = wrong
        for temperature in (None, torch.zeros(3)):
            tokens, logprobs = draw(logits, temperature, torch.tensor([0.0, 0.5, 1 - 2**-24]))
            assert ((tokens >= 0) & (tokens < 2700)).all()
            assert logprobs.isnan().tolist() == [True, wrong != -torch.inf, False]
        logprobs, entropies = token_logprobs(logits, torch.tensor([5, 5, 5]), 1.0, gradient=False)
        assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [True, wrong != -torch.inf, False]
    exact = logits[1].double().log_softmax(-1)
    assert float(logprobs[1]) == pytest.approx(float(exact[5]), abs=1e-5)
    assert float(entropies[1]) == pytest.approx(-float((exact.exp() * exact.clamp_min(-1e9)).sum()), abs=1e-5)


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equal_maxima_is_the_most_probable_token(dtype: torch.dtype) -> None:
    for V, at in ((300, (299,)), (2000, (777, 778, 1999)), (2000, (1025, 1999)), (5, (0, 4)), (64, tuple(range(64)))):
        logits = logits_of(dtype, 1, V).clamp_max(4)
        logits[0, list(at)] = 5.0
        tokens, logprobs = draw(logits, torch.zeros(1), torch.full((1,), 0.9))
        assert tokens.tolist() == [at[0]] == logits.argmax(-1).tolist()
        assert float(logprobs) == pytest.approx(float(logits.double().log_softmax(-1)[0, at[0]]), abs=1e-5)


@needs_ours
def test_a_temperature_near_zero_is_greedy() -> None:
    logits = logits_of(torch.float32, 2, 50)
    tokens, logprobs = draw(logits, torch.tensor([1e-6, 1e-42]), torch.tensor([0.3, 0.9]))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logprobs, torch.zeros(2))


@needs_ours
def test_the_operation_is_the_function() -> None:
    logits, uniforms = logits_of(torch.bfloat16, 4, 99), torch.rand(4)
    with dispatched():
        found = draw(logits, None, uniforms)
    assert all(torch.equal(a, b) for a, b in zip(found, draw(logits, None, uniforms), strict=True))
    torch.library.opcheck(torch.ops.rl_lora.draw, (logits, None, uniforms, 0.5, 3.0))


@needs_ours
def test_a_target_outside_the_vocabulary_is_refused() -> None:
    for target in (-1, 40):
        with pytest.raises(IndexError, match=f"tokens from 0 to 39, got {min(target, 3)} to {max(target, 3)}"):
            token_logprobs(torch.zeros(2, 40), torch.tensor([3, target]), 1.0, gradient=False)


@needs_ours
def test_targets_of_another_integer_type_are_the_same_tokens() -> None:
    logits, targets = logits_of(torch.float32, 4, 40), torch.tensor([3, 39, 0, 17])
    found, expected = (token_logprobs(logits, x, 1.0, gradient=False) for x in (targets.int(), targets))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_devices_are_torchs(dtype: torch.dtype) -> None:
    assert not vocabulary_softmax.supports(dtype, torch.device("cpu"))
    assert not vocabulary_softmax.supports(torch.float32, torch.device("meta"))


@needs_ours
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_logits_in_bfloat16_lose_nothing_behind_the_product(temperature: float) -> None:
    """Log-probabilities and entropies are as exact as in float32, of the same logits; a gradient is rounded once."""
    logits, targets = logits_of(torch.bfloat16, 5, 3001), torch.arange(5)
    exact = (logits.double() / temperature).log_softmax(-1)
    written = logits.clone()
    logprobs, entropies = token_logprobs(written, targets, temperature, gradient=True)
    torch.testing.assert_close(logprobs.double(), exact[targets, targets], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies.double(), -(exact * exact.exp()).sum(-1), rtol=1e-6, atol=1e-6)
    gradient = torch.nn.functional.one_hot(targets, 3001) - exact.exp()
    torch.testing.assert_close(written.double(), gradient, rtol=1.01 * 2**-8, atol=math.exp(-86))
