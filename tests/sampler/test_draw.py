"""One token a row: sampled from the softmax of the logits, to the last bit of the uniform number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lora.policy import head as head_module
from rl_lora.policy.head import Head
from rl_lora.sampler.draw import InverseCDF, sample
from tests.sampler.examples import fits


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("V", [2, 3, 7, 16, 29, 65])
def test_sample_draws_from_the_softmax(V: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(V, generator=generator)
    logits[torch.randperm(V, generator=generator)[: V // 4]] = -torch.inf
    n = 20_000
    drawn, logprobs = sample(
        logits.expand(n, V), torch.full((n,), temperature), torch.rand(n, generator=generator)
    )  # fmt: skip
    exact = (logits.double() / temperature).log_softmax(-1)
    assert fits(drawn, exact.exp())
    torch.testing.assert_close(logprobs.double(), exact[drawn], rtol=0, atol=1e-5)
    assert not fits(drawn, (logits.double() / temperature / 1.3).softmax(-1)), "the test has no power"


@settings(max_examples=200, deadline=None)
@given(
    V=st.integers(1, 300),
    n_possible=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 10_000),
)
def test_a_token_without_probability_is_never_drawn(V: int, n_possible: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    possible = torch.randperm(V, generator=generator)[:n_possible]
    logits = torch.full((V,), -torch.inf)
    logits[possible] = torch.randn(len(possible), generator=generator) * spread
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24])
    uniforms = torch.cat([edges, torch.rand(20, generator=generator)])
    drawn, logprobs = sample(logits.expand(len(uniforms), V), torch.ones(len(uniforms)), uniforms)
    assert torch.isin(drawn, possible).all()
    assert logprobs.isfinite().all()
    assert (logprobs.exp() > 0).all()


@settings(max_examples=100, deadline=None)
@given(V=st.integers(1, 3000), seed=st.integers(0, 10_000))
def test_sample_inverts_the_cumulative_distribution(V: int, seed: int) -> None:
    """The token at which the cumulative probability, in vocabulary order, passes the uniform number; to rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(8, V, generator=generator) * 3, torch.rand(8, generator=generator)
    drawn, _ = sample(logits, torch.ones(8), uniforms)
    above = logits.double().softmax(-1).cumsum(-1).gather(1, drawn[:, None])[:, 0]
    below = above - logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert (below <= uniforms + 1e-6).all()
    assert (above >= uniforms - 1e-6).all()


def test_rows_of_a_batch_have_temperatures_of_their_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, 3)
    drawn, logprobs = sample(logits, torch.tensor([0.0, 0.1, 10.0]), torch.tensor([0.01, 0.01, 0.01]))
    assert drawn.tolist() == [2, 2, 0]
    exact = torch.stack([logits[0], logits[0] / 0.1, logits[0] / 10]).log_softmax(-1)
    torch.testing.assert_close(logprobs, exact[torch.arange(3), drawn])


@pytest.mark.parametrize("temperatures", [None, [1.0, 0.0, 0.5, 2.0, 1.0]])
def test_drawing_in_blocks_from_hidden_states_is_drawing_from_the_logits(
    temperatures: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again with fewer rows and with more, in the same working memory."""
    V, d = 37, 6
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", 2 * V)
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(V, d, generator=generator), torch.randn(V, generator=generator), scale=0.7, softcap=4.0)
    draw = InverseCDF(head)
    for R in (3, 1, 5, 2):
        hidden, uniforms = torch.randn(R, d, generator=generator), torch.rand(R, generator=generator)
        temperature = None if temperatures is None else torch.tensor(temperatures[:R])
        tokens, logprobs = draw(hidden, temperature, uniforms)
        expected, expected_logprobs = sample(head.logits(hidden), temperature, uniforms)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs)
