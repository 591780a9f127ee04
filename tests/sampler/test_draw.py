"""One token a row: sampled from the softmax of the logits, to the last bit of the uniform number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lora.kernels import vocabulary_softmax
from rl_lora.policy import head as head_module
from rl_lora.policy.head import Head
from rl_lora.sampler import draw as draw_module
from rl_lora.sampler.draw import InverseCDF, sample
from tests.sampler.examples import fits

Draw: TypeAlias = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
SAME_FOR_ALL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["torch", "C++", "C++ in bfloat16"])
def draw(request: pytest.FixtureRequest) -> Draw:
    """Of float32 logits that bfloat16 holds exactly."""
    if request.param == "torch":
        return sample
    dtype = torch.bfloat16 if "bfloat16" in request.param else torch.float32
    if vocabulary_softmax.library(dtype) is None:
        pytest.skip("GCC, and AVX2 or AVX-512 are not here")
    return lambda logits, temperature, uniforms: vocabulary_softmax.draw(logits.to(dtype), temperature, uniforms)


def randn(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=generator).bfloat16().float()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("V", [2, 3, 7, 16, 29, 65])
def test_tokens_are_drawn_from_the_softmax(V: int, temperature: float, draw: Draw) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = randn(V, generator=generator)
    logits[torch.randperm(V, generator=generator)[: V // 4]] = -torch.inf
    n = 20_000
    drawn, logprobs = draw(logits.expand(n, V), torch.full((n,), temperature), torch.rand(n, generator=generator))
    exact = (logits.double() / temperature).log_softmax(-1)
    assert fits(drawn, exact.exp())
    torch.testing.assert_close(logprobs.double(), exact[drawn], rtol=0, atol=1e-5)
    assert not fits(drawn, (logits.double() / temperature / 1.3).softmax(-1)), "the test has no power"


@settings(SAME_FOR_ALL, max_examples=200)
@given(
    V=st.integers(1, 2500),
    n_possible=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 10_000),
)
def test_a_token_without_probability_is_never_drawn(
    draw: Draw, V: int, n_possible: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    possible = torch.randperm(V, generator=generator)[:n_possible]
    logits = torch.full((V,), -torch.inf)
    logits[possible] = randn(len(possible), generator=generator) * spread
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24])
    uniforms = torch.cat([edges, torch.rand(20, generator=generator)])
    drawn, logprobs = draw(logits.expand(len(uniforms), V), torch.ones(len(uniforms)), uniforms)
    assert torch.isin(drawn, possible).all()
    assert logprobs.isfinite().all()
    assert (logprobs.exp() > 0).all()


@settings(SAME_FOR_ALL, max_examples=100)
@given(V=st.integers(1, 4000), seed=st.integers(0, 10_000))
def test_a_draw_inverts_the_cumulative_distribution(draw: Draw, V: int, seed: int) -> None:
    """The token at which the cumulative probability, in vocabulary order, passes the uniform number; to rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = randn(8, V, generator=generator) * 2, torch.rand(8, generator=generator)
    drawn, _ = draw(logits, torch.ones(8), uniforms)
    above = logits.double().softmax(-1).cumsum(-1).gather(1, drawn[:, None])[:, 0]
    below = above - logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert (below <= uniforms + 1e-6).all()
    assert (above >= uniforms - 1e-6).all()


def test_rows_of_a_batch_have_temperatures_of_their_own(draw: Draw) -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, 3)
    drawn, logprobs = draw(logits, torch.tensor([0.0, 0.1, 10.0]), torch.tensor([0.01, 0.01, 0.01]))
    assert drawn.tolist() == [2, 2, 0]
    exact = torch.stack([logits[0], logits[0] / 0.1, logits[0] / 10]).log_softmax(-1)
    torch.testing.assert_close(logprobs, exact[torch.arange(3), drawn])


@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [None, [1.0, 0.0, 0.5, 2.0, 1.0]])
def test_drawing_in_blocks_from_hidden_states_is_drawing_from_the_logits(
    temperatures: list[float] | None, dtype: torch.dtype, in_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again with fewer rows and with more, in the same working memory."""
    V, d = 37, 6
    if in_one_pass and vocabulary_softmax.library(dtype) is None:
        pytest.skip("GCC, and AVX2 or AVX-512 are not here")
    if not in_one_pass:
        monkeypatch.setattr(vocabulary_softmax, "supports", lambda *_: False)
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", 2 * V)
    monkeypatch.setitem(draw_module.CHUNK_ELEMENTS, "cpu", 4 * V)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(V, d, generator=generator), torch.randn(V, generator=generator)
    head = Head(weight.to(dtype), bias.to(dtype), scale=0.7, softcap=4.0)
    draw = InverseCDF(head)
    assert draw.in_one_pass == in_one_pass
    for R in (3, 1, 5, 2):
        hidden, uniforms = torch.randn(R, d, generator=generator).to(dtype), torch.rand(R, generator=generator)
        temperature = None if temperatures is None else torch.tensor(temperatures[:R])
        tokens, logprobs = draw(hidden, temperature, uniforms)
        expected, expected_logprobs = sample(head.logits(hidden), temperature, uniforms)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs)
