"""Attention of decoding steps, by torch and in C++, against a dense one in float64; rows are their own, to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lora.attention.decode_layer import DecodeLayer, Shared
from rl_lora.attention.shared_prefix import Sharing
from rl_lora.kernels import decode_attention, native_code
from rl_lora.kernels.attention_options import AttentionOptions
from tests.vectors import VECTORS

needs_ours = pytest.mark.skipif(decode_attention.library(16) is None, reason="GCC, and AVX2 or AVX-512 are not here")
OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=4),
    AttentionOptions(0.5, softcap=2.0),
    AttentionOptions(0.2, window=30, softcap=1.5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5, -3.0])),
]


@dataclass
class Step:
    """A decoding step of one layer with random numbers, and the rows' own keys and values as the layer reads them."""

    layer: DecodeLayer
    query: Tensor
    own: tuple[Tensor, Tensor]

    @classmethod
    def random(
        cls,
        seed: int,
        n_tokens: int,
        width: int,
        heads: int = 6,
        key_heads: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> Step:
        rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        n_prompts, n_prefixes = int(rng.integers(2, 5)), int(rng.integers(0, 3))
        owner = np.sort(rng.integers(0, n_prompts, n_prompts + 4))
        R = len(owner)
        levels = [(n_prompts, owner)]
        if n_prefixes:
            levels.insert(0, (n_prefixes, rng.integers(0, n_prefixes, n_prompts)[owner]))
        shared = []
        for n, of_row in levels:
            lengths = rng.integers(0, 70, n)
            key, value = torch.randn(2, n, key_heads, int(lengths.max()) + 3, width, generator=g).to(dtype)
            lengths_of_rows = torch.from_numpy(lengths[of_row])
            shared.append(Shared(key, value, lengths_of_rows, Sharing(of_row, n)))
        at = torch.from_numpy(rng.integers(0, 40, R))[:, None] + torch.arange(n_tokens)
        W = int(at.max()) + 2
        buffers = torch.randn(2, R + 2, key_heads, W + 5, width, generator=g).to(dtype)
        layer = DecodeLayer(buffers[0], buffers[1], at, torch.arange(W), shared, torch.arange(R))
        query = torch.randn(R, n_tokens, heads, width, generator=g).to(dtype).transpose(1, 2)
        return cls(layer, query, (buffers[0][:R, :, :W], buffers[1][:R, :, :W]))

    def is_ours(self) -> bool:
        sources = [*((x.key, x.value) for x in self.layer.shared), self.own]
        return decode_attention.supports(self.query, [x[0] for x in sources], [x[1] for x in sources])

    def attend(self, options: AttentionOptions) -> Tensor:
        return self.layer.attend(0, self.query, *self.own, options)

    def dense(self, options: AttentionOptions) -> Tensor:
        """float64, query by query."""
        R, H, n, _ = self.query.shape
        out = torch.zeros_like(self.query, dtype=torch.float64)
        for row in range(R):
            parts: tuple[list[Tensor], list[Tensor]] = [], []
            for shared in self.layer.shared:
                node, length = int(shared.sharing.owner[row]), int(shared.lengths[row])
                parts[0].append(shared.key[node, :, :length])
                parts[1].append(shared.value[node, :, :length])
            for token in range(n):
                length = int(self.layer.at[row, token]) + 1
                k, v = (
                    torch.cat([*part, own[row, :, :length]], 1).double().repeat_interleave(H // own.shape[1], 0)
                    for part, own in zip(parts, self.own, strict=True)
                )
                if options.window is not None:
                    k, v = k[:, -options.window :], v[:, -options.window :]
                scores = torch.einsum("hd,hkd->hk", self.query[row, :, token].double(), k) * options.scaling
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                if options.sinks is not None:
                    scores = torch.cat([scores, options.sinks[:, None].double()], -1)
                p = torch.softmax(scores, -1)[:, : k.shape[1]]
                out[row, :, token] = torch.einsum("hk,hkd->hd", p, v)
        return out


def require_attention(out: Tensor, step: Step, options: AttentionOptions) -> None:
    """Sums of float32, rounded to the dtype of the output at the end."""
    assert out.dtype == step.query.dtype
    rtol = 1e-5 if out.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), step.dense(options), atol=1e-5 if rtol == 1e-5 else 5e-4, rtol=rtol)


@pytest.fixture(params=["ours", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(decode_attention, "library", lambda width: None)
    elif decode_attention.library(16) is None:
        pytest.skip("GCC, and AVX2 or AVX-512 are not here")
    return request.param


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_attention(way: str, options: AttentionOptions, n_tokens: int, seed: int) -> None:
    for width in (16, 64, 80, 12):
        step = Step.random(seed, n_tokens, width)
        with torch.inference_mode():
            assert step.is_ours() == (way == "ours" and width != 12)
            out = step.attend(options)
        torch.testing.assert_close(out.double(), step.dense(options), atol=1e-5, rtol=1e-5)


@needs_ours
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_is_rounded_only_at_the_end(options: AttentionOptions, seed: int) -> None:
    for width in (16, 64, 80):
        step = Step.random(seed, 1 + seed % 2, width, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert step.is_ours()
            require_attention(step.attend(options), step, options)


@needs_ours
def test_bfloat16_is_nearer_to_float64_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    options, errors = AttentionOptions(0.3), []
    for library in (decode_attention.library, lambda width: None):
        monkeypatch.setattr(decode_attention, "library", library)
        steps = [Step.random(seed, 1, 64, dtype=torch.bfloat16) for seed in range(3)]
        with torch.inference_mode():
            found = torch.cat([(step.attend(options) - step.dense(options)).flatten() for step in steps])
        errors.append(float(found.square().mean().sqrt()))
    assert errors[0] < 0.5 * errors[1]


@needs_ours
@pytest.mark.parametrize("dtype", decode_attention.ROUNDING)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (14, 2), (5, 1)])
def test_any_number_of_heads_reads_a_head_of_keys(heads: int, key_heads: int, dtype: torch.dtype) -> None:
    for width in (32, 128, 256):
        step = Step.random(heads, 1, width, heads, key_heads, dtype)
        with torch.inference_mode():
            assert step.is_ours()
            out = step.attend(AttentionOptions(width**-0.5))
        require_attention(out, step, AttentionOptions(width**-0.5))


@needs_ours
@pytest.mark.parametrize("dtype", decode_attention.ROUNDING)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """To the bit: alone, on one thread or many, behind longer buffers."""
    step, options = Step.random(1, 1, 64, dtype=dtype), AttentionOptions(0.125, window=50)
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = step.attend(options)
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(step.attend(options), whole)
        finally:
            torch.set_num_threads(before)
        for row in range(len(whole)):
            shared = []
            for x in step.layer.shared:
                node = slice(int(x.sharing.owner[row]), int(x.sharing.owner[row]) + 1)
                shared.append(Shared(x.key[node], x.value[node], x.lengths[[row]], Sharing(np.zeros(1, np.int64), 1)))
            one = slice(row, row + 1)
            keys, values = step.layer.keys[one], step.layer.values[one]
            alone = DecodeLayer(
                keys, values, step.layer.at[one], step.layer.slots, shared, torch.zeros(1, dtype=torch.int64)
            )
            assert torch.equal(alone.attend(0, step.query[one], keys, values, options), whole[one])


@needs_ours
@pytest.mark.parametrize("dtype", decode_attention.ROUNDING)
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_scores_of_any_size_make_probabilities(shift: float, dtype: torch.dtype) -> None:
    """Values of one give one back, also where all but one key count for nothing; what is not finite is not hidden."""
    step = Step.random(2, 1, 16, dtype=dtype)
    step.query *= 1 + abs(shift)
    for values in (*(x.value for x in step.layer.shared), step.own[1]):
        values.fill_(1)
    with torch.inference_mode():
        out = step.attend(AttentionOptions(1.0 if shift >= 0 else -1.0))
        torch.testing.assert_close(out, torch.ones_like(out))
        step.own[0][0] = math.nan
        out = step.attend(AttentionOptions(1.0))
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()


@needs_ours
@pytest.mark.parametrize(("lanes", "flag"), [*VECTORS, (16, "-mno-avx512bf16"), (8, "-march=haswell")])
def test_vectors_of_other_processors(lanes: int, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products of bfloat16 pairs are emulated, with pairs of vectors and one that is left."""
    decode_attention.library.cache_clear()
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    try:
        for dtype in decode_attention.ROUNDING:
            step = Step.random(3, 2, 3 * lanes, dtype=dtype)
            with torch.inference_mode():
                assert step.is_ours()
                require_attention(step.attend(OPTIONS[3]), step, OPTIONS[3])
    finally:
        decode_attention.library.cache_clear()


@needs_ours
@pytest.mark.parametrize("dtype", decode_attention.ROUNDING)
def test_what_is_shared_does_not_matter(dtype: torch.dtype) -> None:
    """To the bit: keys in one source, or cut in two at any place."""
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 1, 12, 64, generator=g).to(dtype)
    own = torch.randn(2, 1, 1, 8, 64, generator=g).to(dtype)
    query = torch.randn(1, 1, 1, 64, generator=g).to(dtype)
    at, row = torch.tensor([[5]]), torch.zeros(1, dtype=torch.int64)

    def attend(*sources: Shared) -> Tensor:
        layer = DecodeLayer(own[0], own[1], at, torch.arange(8), sources, row)
        return layer.attend(0, query, own[0], own[1], AttentionOptions(0.125))

    def part(start: int, end: int) -> Shared:
        sharing = Sharing(np.zeros(1, np.int64), 1)
        return Shared(key[:, :, start:end], value[:, :, start:end], torch.tensor([end - start]), sharing)

    with torch.inference_mode():
        for cut in range(13):
            assert torch.equal(attend(part(0, cut), part(cut, 12)), attend(part(0, 12)))


def test_other_numbers_other_widths_and_gradients_are_torchs() -> None:
    step = Step.random(0, 1, 16)
    keys, values = [step.own[0]], [step.own[1]]
    assert not decode_attention.supports(step.query, keys, values)  # gradients are on
    wide = [torch.cat([x, x], -1) for x in values]
    one_head = [x[:, :1] for x in keys]
    with torch.inference_mode():
        for other in (torch.float64, torch.float16, torch.bfloat16, torch.device("meta")):
            assert not decode_attention.supports(step.query.to(other), keys, values)
            assert not decode_attention.supports(step.query, [x.to(other) for x in keys], values)
            assert not decode_attention.supports(step.query, keys, [x.to(other) for x in values])
        assert not decode_attention.supports(step.query, keys, wide)
        assert not decode_attention.supports(step.query, [*keys, *one_head], [*values, *values])
        assert not decode_attention.supports(step.query[:, :5], keys, values)
        broad = torch.randn(2, 2, 1, 2 * decode_attention.WIDEST)
        assert not decode_attention.supports(broad, [broad], [broad])


@pytest.mark.parametrize("way", ["ours", "torch"], indirect=True)
def test_values_of_another_width_than_keys(way: str) -> None:
    step = Step.random(5, 1, 16)
    layer = step.layer
    layer.shared = [x._replace(value=torch.cat([x.value, -x.value], -1)) for x in layer.shared]
    value = torch.cat([step.own[1], -step.own[1]], -1)
    with torch.inference_mode():
        out = layer.attend(0, step.query, step.own[0], value, OPTIONS[1])
        one = Step.random(5, 1, 16).attend(OPTIONS[1])
    torch.testing.assert_close(out, torch.cat([one, -one], -1), atol=1e-5, rtol=1e-5)
