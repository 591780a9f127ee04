"""Products with the deltas of adapters against float64: outputs and gradients; a row has its own adapter's alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lora.kernels import adapted_linear, frozen_linear, native_code, packed_gemm
from rl_lora.kernels.adapted_linear import Ranks
from rl_lora.kernels.frozen_linear import FrozenLinear, _operators
from rl_lora.kernels.native_code import dispatched
from rl_lora.kernels.row_deltas import RowDeltas
from tests.vectors import VECTORS

DTYPES = [torch.float32, torch.bfloat16]
RANKS = (3, 1, 20, 4, 8)
"""Of the adapters of a batch; the last one but one is on no row."""
SCALES = (2.0, 0.7, 4.0, 1.0, 1.6)
IDLE = 3
THREADS = (1, 2, 3, 5)

pytestmark = pytest.mark.skipif(packed_gemm.library() is None, reason="GCC, and AVX2 or AVX-512 are not here")


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The products of this package, on processors with tiles too."""
    monkeypatch.setattr(frozen_linear, "_has_tiles", lambda: False)
    _operators.cache_clear()
    yield
    _operators.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Layer(NamedTuple):
    """A frozen layer with adapters on it, and what a batch gives it."""

    product: FrozenLinear
    factors: list[tuple[Tensor, Tensor]]
    """float32 A (r, in), B (out, r) of each adapter."""
    rows: Tensor
    """int64 (N,): which adapter a row carries; -1: none."""
    x: Tensor
    grad: Tensor
    """Of y."""

    def places(self) -> list[Ranks]:
        ends = torch.tensor([len(A) for A, _ in self.factors]).cumsum(0).tolist()
        return [Ranks(end - len(A), end, s) for end, (A, _), s in zip(ends, self.factors, SCALES, strict=True)]

    def deltas(self) -> RowDeltas:
        dtype, places = self.x.dtype, self.places()
        A = in_panels(torch.cat([A for A, _ in self.factors]).to(dtype))
        B = in_panels(torch.cat([s * B.t() for (_, B), s in zip(self.factors, SCALES, strict=True)]).to(dtype))
        first = torch.tensor([*(place.start for place in places), 0])[self.rows]
        count = torch.tensor([*(place.stop - place.start for place in places), 0])[self.rows]
        return RowDeltas(A, B, first, count, max(len(A) for A, _ in self.factors))

    def of(self, rows: Sequence[int]) -> Layer:
        """The same for some of the rows."""
        return self._replace(rows=self.rows[rows], x=self.x[rows], grad=self.grad[rows])

    def y(self) -> Tensor:
        with torch.no_grad():
            return adapted_linear.adapted_linear(self.x, self.product, self.deltas(), (), ())

    def gradients(self) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """y, dx, and dA, dB of each adapter."""
        x = self.x.clone().requires_grad_()
        leaves = [of_one.detach().clone().requires_grad_() for factors in self.factors for of_one in factors]
        y = adapted_linear.adapted_linear(x, self.product, self.deltas(), self.places(), leaves)
        y.backward(self.grad)
        grads = [gradient(leaf) for leaf in leaves]
        return y.detach(), gradient(x), list(zip(grads[::2], grads[1::2], strict=True))

    def exact(self) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """The same by float64 autograd, of the factors as they are in the compute dtype."""
        x = self.x.double().requires_grad_()
        bias = self.product.bias
        y = F.linear(x, self.product.weight.double(), None if bias is None else bias.double())
        leaves, dtype = [], self.x.dtype
        for i, ((A, B), scale) in enumerate(zip(self.factors, SCALES, strict=True)):
            A64 = A.to(dtype).double().requires_grad_()
            B64 = ((scale * B).to(dtype).double() / scale).requires_grad_()
            leaves.append((A64, B64))
            y = y + (self.rows == i)[:, None] * (x @ A64.t() @ B64.t()) * scale
        y.backward(self.grad.double())
        return y.detach(), gradient(x), [(gradient(A), gradient(B)) for A, B in leaves]


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def in_panels(x: Tensor) -> Tensor:
    return F.pad(x, (0, packed_gemm.padded(x.shape[1]) - x.shape[1]))


def layer(dtype: torch.dtype, n: int, n_in: int, n_out: int, biased: bool = False, seed: int = 0) -> Layer:
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=g)

    rows = torch.randint(-1, len(RANKS), (n,), generator=g)
    rows[rows == IDLE] = -1
    return Layer(
        FrozenLinear(noise(n_out, n_in, size=n_in**-0.5).to(dtype), noise(n_out).to(dtype) if biased else None, 2),
        [(noise(r, n_in, size=n_in**-0.5), noise(n_out, r)) for r in RANKS],
        rows.sort().values if seed % 2 else rows,  # rows of an adapter are neighbours, or not
        noise(n, n_in).to(dtype),
        noise(n, n_out).to(dtype),
    )


def close(what: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    limit = tolerance * max(1e-9, float(exact.abs().max()))
    error = float((found.double() - exact).abs().max())
    assert error <= limit, f"{what} is off by {error:.2g}, more than {limit:.2g}"  # false for NaN


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("n", "n_in", "n_out"), [(1, 5, 7), (13, 64, 96), (31, 75, 33), (16, 130, 257), (601, 33, 65), (9, 4101, 3)]
)
def test_outputs_and_gradients(dtype: torch.dtype, biased: bool, n: int, n_in: int, n_out: int) -> None:
    """Sums and gradients of factors are in float32; y and dx are rounded once."""
    of = layer(dtype, n, n_in, n_out, biased, seed=n)
    y, dx, factors = of.gradients()
    exact_y, exact_dx, exact_factors = of.exact()
    assert y.dtype == dx.dtype == dtype
    rounding = max(1e-5, torch.finfo(dtype).eps)
    close("y", y, exact_y, rounding)
    close("dx", dx, exact_dx, rounding)
    for i, (found, exact) in enumerate(zip(factors, exact_factors, strict=True)):
        for name, ours, expected in zip(("dA", "dB"), found, exact, strict=True):
            assert ours.dtype == torch.float32
            close(f"{name} of adapter {i}", ours, expected, 1e-5)
            assert bool(ours.any()) == bool((of.rows == i).any())
    assert torch.equal(of.y(), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 19])
def test_one_adapter_of_any_rank_on_all_rows(dtype: torch.dtype, rank: int) -> None:
    of = layer(dtype, 21, 40, 50)
    A, B = torch.randn(rank, 40), torch.randn(50, rank)
    empty = (torch.zeros(0, 40), torch.zeros(50, 0))  # an adapter that does not stand here
    of = of._replace(factors=[(A, B), *[empty] * (len(RANKS) - 1)], rows=torch.zeros(21, dtype=torch.int64))
    y, dx, ((dA, dB), *_) = of.gradients()
    exact_y, exact_dx, ((exact_dA, exact_dB), *_) = of.exact()
    rounding = max(1e-5, torch.finfo(dtype).eps)
    for what, found, exact, tolerance in (
        ("y", y, exact_y, rounding),
        ("dx", dx, exact_dx, rounding),
        ("dA", dA, exact_dA, 1e-5),
        ("dB", dB, exact_dB, 1e-5),
    ):
        close(what, found, exact, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_or_factors_that_need_no_gradient(dtype: torch.dtype) -> None:
    of = layer(dtype, 19, 37, 45)
    _, dx, factors = of.gradients()
    leaves = [x.clone().requires_grad_() for of_one in of.factors for x in of_one]
    adapted_linear.adapted_linear(of.x, of.product, of.deltas(), of.places(), leaves).backward(of.grad)
    for leaf, expected in zip(leaves, [x for of_one in factors for x in of_one], strict=True):
        torch.testing.assert_close(gradient(leaf), expected, rtol=1e-5, atol=1e-5)
    x, constant = of.x.clone().requires_grad_(), [leaf.detach() for leaf in leaves]
    adapted_linear.adapted_linear(x, of.product, of.deltas(), of.places(), constant).backward(of.grad)
    assert torch.equal(gradient(x), dx)
    assert all(leaf.grad is None for leaf in constant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), [(33, 70), (64, 128), (4500, 40)])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(
    dtype: torch.dtype, n_in: int, n_out: int, threads: None
) -> None:
    """To the bit: with other rows, other adapters on them, and in bfloat16 what the gradient gives it."""
    of = layer(dtype, 300, n_in, n_out, biased=True)
    y, dx, _ = of.gradients()
    g = torch.Generator().manual_seed(1)
    for n_threads in THREADS:
        torch.set_num_threads(n_threads)
        for n in (1, 2, 17, 300):
            chosen = torch.randperm(300, generator=g)[:n].tolist()
            found_y, found_dx, _ = of.of(chosen).gradients()
            assert torch.equal(found_y, y[chosen])
            if dtype == torch.bfloat16:  # in float32 torch multiplies by W
                assert torch.equal(found_dx, dx[chosen])
        others = of._replace(
            factors=[of.factors[0], *((-2 * A, 3 * B) for A, B in of.factors[1:])], x=of.x.clone(), rows=of.rows.clone()
        )
        kept = (of.rows <= 0).nonzero()[:, 0]
        others.x[of.rows > 0] *= 5
        others.rows[of.rows == 1] = IDLE
        assert torch.equal(others.y()[kept], y[kept])
        assert not torch.equal(others.y(), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_factors_do_not_depend_on_threads_or_on_other_adapters(dtype: torch.dtype, threads: None) -> None:
    """To the bit, where an adapter's rows are neighbours, as they are in learning."""
    of = layer(dtype, 120, 75, 200)._replace(rows=torch.arange(120) // 30 - 1)
    _, _, factors = of.gradients()
    for n_threads in THREADS:
        torch.set_num_threads(n_threads)
        for i in range(3):
            mine = (of.rows == i).nonzero()[:, 0].tolist()
            for rows in (mine, list(range(120))):
                _, _, again = of.of(rows).gradients()
                if dtype == torch.bfloat16:
                    assert all(torch.equal(a, b) for a, b in zip(again[i], factors[i], strict=True))
                else:  # z and u are the same; torch's products are not asked
                    close("dA", again[i][0], factors[i][0].double(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_adapter_are_the_bases_to_the_bit(dtype: torch.dtype) -> None:
    for n, n_in, n_out in ((50, 33, 70), (600, 64, 64), (7, 4500, 31)):
        of = layer(dtype, n, n_in, n_out, biased=True)
        bare = of.rows < 0
        with torch.no_grad():
            assert torch.equal(of.y()[bare], of.product(of.x)[bare])
        assert not torch.equal(of.y(), of.product(of.x))
        x = of.x.clone().requires_grad_()
        adapted_linear.frozen_linear(x, of.product).backward(of.grad)
        _, dx, _ = of.gradients()
        assert torch.equal(dx[bare], gradient(x)[bare])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_with_their_adapter(dtype: torch.dtype, wrong: float) -> None:
    for bad in (0, 1, 2, IDLE, 4):
        of = layer(dtype, 60, 33, 70)
        y, dx, factors = of.gradients()
        for which in (0, 1):
            damaged = [(A.clone(), B.clone()) for A, B in of.factors]
            damaged[bad][which].fill_(wrong)
            found_y, found_dx, found = of._replace(factors=damaged).gradients()
            others = of.rows != bad
            assert torch.equal(found_y[others], y[others])
            assert torch.equal(found_dx[others], dx[others])
            assert not found_y[~others].isfinite().any()
            for i, (ours, before) in enumerate(zip(found, factors, strict=True)):
                if i != bad:
                    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_reaches_its_own_adapter_alone(dtype: torch.dtype) -> None:
    of = layer(dtype, 60, 33, 70)
    y, dx, factors = of.gradients()
    row = int((of.rows == 2).nonzero()[0])
    of.x[row, 5] = torch.nan
    of.grad[row, 6] = torch.inf
    found_y, found_dx, found = of.gradients()
    others = torch.arange(60) != row
    assert torch.equal(found_y[others], y[others])
    assert torch.equal(found_dx[others], dx[others])
    for i, (ours, before) in enumerate(zip(found, factors, strict=True)):
        assert all(torch.equal(a, b) == (i != 2) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 576), (576, 96), (1537, 33)])
def test_bfloat16_is_no_further_off_than_torchs(n_in: int, n_out: int) -> None:
    of = layer(torch.bfloat16, 64, n_in, n_out, biased=True)
    exact_y, exact_dx, exact_factors = of._replace().exact()
    ours = of.gradients()

    x = of.x.clone().requires_grad_()
    leaves = [leaf.clone().requires_grad_() for of_one in of.factors for leaf in of_one]
    theirs_y = F.linear(x, of.product.weight, of.product.bias)
    for i, scale in enumerate(SCALES):
        A, B = (leaf.bfloat16() for leaf in leaves[2 * i : 2 * i + 2])
        rows = (of.rows == i).nonzero()[:, 0]
        if len(rows):
            added = torch.addmm(theirs_y[rows], x[rows] @ A.t(), B.t(), alpha=scale)
            theirs_y = theirs_y.index_copy(0, rows, added)
    theirs_y.backward(of.grad)

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.detach().double() - exact).pow(2).mean().sqrt())

    assert error(ours[0], exact_y) <= error(theirs_y, exact_y)
    assert error(ours[1], exact_dx) <= error(gradient(x), exact_dx)
    for i, (found, exact) in enumerate(zip(ours[2], exact_factors, strict=True)):
        if i != IDLE:
            for one, expected, leaf in zip(found, exact, leaves[2 * i : 2 * i + 2], strict=True):
                assert error(one, expected) <= error(gradient(leaf), expected)


@pytest.mark.parametrize("flag", [*(flag for _, flag in VECTORS), "-mno-avx512bf16", "-march=haswell"])
def test_builds_for_other_processors(flag: str, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    caches = packed_gemm.library, _operators, adapted_linear.serves
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    for cache in caches:
        cache.cache_clear()
    try:
        for dtype in DTYPES:
            assert adapted_linear.serves("cpu", dtype)
            operators = _operators(dtype)
            assert operators is not None
            assert operators.is_ours
            for shape in ((31, 75, 33), (9, 4101, 3)):
                test_outputs_and_gradients(dtype, True, *shape)
            test_a_row_does_not_depend_on_its_neighbours_or_on_threads(dtype, 33, 70, None)
            test_numbers_that_are_not_finite_stay_with_their_adapter(dtype, torch.nan)
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [0, 2])
def test_the_operation_is_the_function(dtype: torch.dtype, copies: int) -> None:
    """With packed weights, and where torch multiplies."""
    of = layer(dtype, 23, 33, 70, biased=True)
    of = of._replace(product=FrozenLinear(of.product.weight, of.product.bias, copies))
    y, dx, factors = of.gradients()
    with dispatched():
        assert torch.equal(of.y(), y)
        again = of.gradients()
    assert torch.equal(again[1], dx)
    for found, expected in zip(again[2], factors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    product, deltas = of.product, of.deltas()
    assert (product.packed is None) == (copies == 0)
    given = deltas.A, deltas.B, deltas.first, deltas.count
    arguments = of.x, product.packed, product.weight, product.bias, *given
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rl_lora.frozen_linear, arguments, test_utils=checks)
    if product.packed is not None:
        several = [[x, x] for x in arguments[1:]]
        torch.library.opcheck(torch.ops.rl_lora.frozen_linears, (of.x, *several), test_utils=checks)


def test_what_does_not_belong_together_is_refused() -> None:
    of = layer(torch.bfloat16, 6, 33, 70)
    deltas = of.deltas()
    with torch.no_grad():
        with pytest.raises(ValueError, match="deltas of 6 rows, but x has 4"):
            of.product.add_deltas(of.x[:4], deltas)
        with pytest.raises(ValueError, match=r"A and B of the deltas are torch\.bfloat16"):
            packed_gemm.add_deltas(of.x.float(), deltas, None)
        with pytest.raises(ValueError, match=r"expected a contiguous y of torch\.bfloat16"):
            packed_gemm.add_deltas(of.x, deltas, torch.zeros(70, 6, dtype=torch.bfloat16).t())


def test_deltas_that_are_wrong_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted_linear.serves.cache_clear()
    monkeypatch.setattr(packed_gemm, "sums_of_outer", lambda z, x, deltas: torch.zeros(len(deltas.A), x.shape[1]))
    try:
        with pytest.warns(UserWarning, match="deltas of adapters are left to torch: in C"):
            assert not adapted_linear.serves("cpu", torch.float32)
    finally:
        adapted_linear.serves.cache_clear()


def test_other_dtypes_and_devices_are_torchs() -> None:
    assert not adapted_linear.serves("cpu", torch.float16)
    assert not adapted_linear.serves("meta", torch.float32)
