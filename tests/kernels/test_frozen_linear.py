"""Products with packed weights against float64, and when weights are packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rl_lora.kernels import frozen_linear, native_code, packed_gemm
from rl_lora.kernels.frozen_linear import MOST_ROWS, FrozenLinear, Operators, _operators, packed_copies
from rl_lora.kernels.packed_gemm import Product
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.lora.layers import LoRALinear
from tests.oracles import tiny_policy
from tests.tiny import tiny_model
from tests.vectors import VECTORS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [1, 2, 3, 17, 64, 129, MOST_ROWS, MOST_ROWS + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(7, 5), (192, 576), (576, 1536), (1, 64)])
def test_it_is_the_product_whatever_the_number_of_rows(dtype: torch.dtype, biased: bool, n_out: int, n_in: int) -> None:
    g = torch.Generator().manual_seed(n_out)
    weight = torch.randn(n_out, n_in, generator=g).to(dtype)
    bias = torch.randn(n_out, generator=g).to(dtype) if biased else None
    layer = FrozenLinear(weight, bias, copies=2)
    for n in (*ROWS, 5):
        x = torch.randn(n, n_in, generator=g).to(dtype)
        with torch.inference_mode():
            found = layer(x)
            again = layer(x.t().contiguous().t())  # in another memory order
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert found.shape == exact.shape
        assert found.dtype == dtype
        atol = 64 * torch.finfo(dtype).eps * math.sqrt(n_in)
        torch.testing.assert_close(found.double(), exact, atol=atol, rtol=torch.finfo(dtype).eps)
        torch.testing.assert_close(again, found, atol=atol, rtol=torch.finfo(dtype).eps)


def test_gradients_go_through_it() -> None:
    layer = FrozenLinear(torch.randn(6, 5), copies=2)
    with torch.no_grad():
        layer(torch.ones(3, 5))
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 5))


def test_a_weight_that_was_written_to_is_packed_anew() -> None:
    layer = FrozenLinear(torch.randn(6, 5), copies=2)
    x = torch.randn(3, 5)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.fixture
def fresh_operators() -> Iterator[None]:
    """What was found out about this machine is found out anew, and again afterwards."""
    _operators.cache_clear()
    packed_gemm.library.cache_clear()
    yield
    _operators.cache_clear()
    packed_gemm.library.cache_clear()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the library is not part of this torch")
def test_where_the_library_is_there_it_is_used(fresh_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler
    assert packed_gemm.library() is None
    assert _operators(torch.float32) is not None
    assert _operators(torch.float16) is None
    test_it_is_the_product_whatever_the_number_of_rows(torch.float32, True, 192, 576)


@pytest.mark.parametrize("wrong", ["product", "missing"])
def test_an_operator_that_computes_something_else_is_not_used(
    wrong: str, fresh_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return 2 * F.linear(x, weight, bias)

    def missing(dtype: torch.dtype) -> None:
        raise AttributeError("no such operator")

    candidate = {"product": lambda _: Operators(lambda weight: weight, twice, 1, 512), "missing": missing}[wrong]
    monkeypatch.setattr(frozen_linear, "_ours", candidate)
    monkeypatch.setattr(frozen_linear, "_mkl", missing)
    layer = FrozenLinear(torch.randn(6, 5), copies=2)
    x = torch.randn(3, 5)
    said = pytest.warns(UserWarning, match="a product of 1 rows differs") if wrong == "product" else nullcontext()
    with torch.no_grad(), said:
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert not layer.copies


needs_ours = pytest.mark.skipif(packed_gemm.library() is None, reason="GCC, and AVX2 or AVX-512 are not here")


@pytest.fixture
def prefer_ours(fresh_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of this package, on processors with tiles too."""
    monkeypatch.setattr(frozen_linear, "_has_tiles", lambda: False)


@needs_ours
@pytest.mark.parametrize("held", ["float32", "halved", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 800), (33, 2001), (1, 1), (40, 4600)])
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(
    held: str, biased: bool, n_out: int, n_in: int, prefer_ours: None
) -> None:
    """To the bit, whatever the number of rows and threads; where bfloat16 holds the weight, and where not."""
    g = torch.Generator().manual_seed(n_out)
    dtype = torch.bfloat16 if held == "bfloat16" else torch.float32
    weight, bias = torch.randn(n_out, n_in, generator=g), torch.randn(n_out, generator=g) if biased else None
    weight = (weight if held == "float32" else weight.bfloat16()).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    layer = FrozenLinear(weight, bias, copies=2)
    N = MOST_ROWS if dtype == torch.float32 else MOST_ROWS + 100
    x = torch.randn(N, n_in, generator=g).to(dtype)
    wide = torch.full((N, 2 * n_out), torch.nan)
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = layer(x)
        exact_products = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        layer(x, out=wide[:, n_out:])  # in float32, which is not rounded from bfloat16
        torch.testing.assert_close(wide[:, n_out:].double(), exact_products, atol=1e-5 * math.sqrt(n_in), rtol=1e-6)
        assert torch.equal(wide[:, n_out:].to(dtype), whole)
        assert wide[:, :n_out].isnan().all()
        for to in (torch.float64, torch.bfloat16):
            assert torch.equal(layer(x, out=torch.empty(N, n_out, dtype=to)), wide[:, n_out:].to(to))
        try:
            for threads, n in ((1, 1), (1, 13), (2, 29), (5, 1), (7, 64), (3, N)):
                torch.set_num_threads(threads)
                start = int(torch.randint(N - n + 1, (), generator=g))
                assert torch.equal(layer(x[start : start + n]), whole[start : start + n])
        finally:
            torch.set_num_threads(before)
    assert layer.packed is not None
    assert layer.packed.dtype == (torch.float32 if held == "float32" else torch.bfloat16)


@needs_ours
@pytest.mark.parametrize(("lanes", "flag"), [*VECTORS, (None, "-mno-avx512bf16"), (8, "-march=haswell")])
def test_builds_for_other_processors(
    lanes: int | None, flag: str, prefer_ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    found = packed_gemm.library()
    assert found is not None
    assert lanes is None or found.lanes() == lanes
    for dtype in (torch.float32, torch.bfloat16):
        operators = _operators(dtype)
        assert operators is not None
        assert operators.is_ours
        for shape in ((192, 576), (7, 5)):
            test_it_is_the_product_whatever_the_number_of_rows(dtype, True, *shape)
    for held, shape in (("halved", (192, 576)), ("halved", (7, 5)), ("bfloat16", (33, 4601))):
        test_a_row_of_a_product_does_not_depend_on_its_neighbours(held, True, *shape, None)


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "n_out", "n_in"), [(5, 33, 70), (40, 96, 65), (600, 40, 33)])
def test_turned_is_the_product_with_the_transposed_weight(
    dtype: torch.dtype, n: int, n_out: int, n_in: int, prefer_ours: None
) -> None:
    """Also after the weight has been written to."""
    layer, x = FrozenLinear(torch.randn(n_out, n_in).to(dtype), copies=2), torch.randn(n, n_out).to(dtype)
    with torch.no_grad():
        for factor in (1, -3):
            layer.weight.mul_(factor)
            exact = x.double() @ layer.weight.double()
            atol = max(1e-5, torch.finfo(dtype).eps) * float(exact.abs().max())
            torch.testing.assert_close(layer.turned(x).double(), exact, atol=atol, rtol=0)
    assert (layer.turned.packed is not None) == (dtype == torch.bfloat16)
    assert FrozenLinear(layer.weight, copies=1).turned.copies == 0


def deltas_of(dtype: torch.dtype, n: int, n_in: int, n_out: int) -> RowDeltas:
    A, B = (torch.randn(5, packed_gemm.padded(size)).to(dtype) for size in (n_in, n_out))
    return RowDeltas(A, B, 2 * (torch.arange(n) % 2), 3 * (torch.arange(n) % 2), 5)


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 20, 300])
@pytest.mark.parametrize("n_in", [64, 33, 4500])
def test_several_products_at_once_are_each_of_them_to_the_bit(dtype: torch.dtype, n: int, n_in: int) -> None:
    x, products = torch.randn(n, n_in).to(dtype), []
    for i, n_out in enumerate((33, 128, 5)):
        weight = torch.randn(n_out, n_in).bfloat16().to(dtype)
        bias = torch.randn(n_out).to(dtype) if i == 1 else None
        deltas = deltas_of(dtype, n, n_in, n_out) if i != 2 else None
        products.append(Product(packed_gemm.pack_weight(weight), n_out, bias, deltas))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for (y, z), product in zip(packed_gemm.multiply_all(x, products), products, strict=True):
                alone, z_alone = packed_gemm.multiply(x, product)
                assert torch.equal(y, alone)
                assert (z is None) == (z_alone is None) == (product.deltas is None)
                if z is not None and z_alone is not None:
                    assert torch.equal(z[1::2, :3], z_alone[1::2, :3])
    finally:
        torch.set_num_threads(before)


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_same_rows_are_joined(dtype: torch.dtype, prefer_ours: None) -> None:
    """Those with deltas, whose weights are given from outside; the others stay as they are."""
    x = torch.randn(6, 16).to(dtype)
    weights = [torch.randn(n, x.shape[1]).to(dtype) for n in (16, 40, 8)]
    packed = [packed_gemm.pack_weight(weight) for weight in weights]
    of = [deltas_of(dtype, 6, 16, len(weight)) for weight in weights]
    flat = [[p, w, d.A, d.B, d.first, d.count] for p, w, d in zip(packed, weights, of, strict=True)]

    def one(x: Tensor, p: Tensor, w: Tensor, *deltas: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.rl_lora.frozen_linear(x, p, w, None, *(deltas or [None] * 4))[0]
        return y

    def layer(x: Tensor, *given: Tensor) -> Tensor:
        q, k, v = (one(x, *given[6 * i : 6 * i + 6]) for i in range(3))
        bare = one(x, *given[:2])
        return torch.cat([one(q + bare, *given[:6]), k, v, bare], 1)

    inputs = [x, *(given for of_one in flat for given in of_one)]
    graph = make_fx(layer, tracing_mode="fake")(*inputs)
    expected = graph(*inputs)
    frozen_linear.join_products(graph.graph)
    graph.recompile()
    names = [str(node.target) for node in graph.graph.nodes if "rl_lora" in str(node.target)]
    assert names == [
        "rl_lora.frozen_linears.default",
        "rl_lora.frozen_linear.default",
        "rl_lora.frozen_linear.default",
    ]
    assert torch.equal(graph(*inputs), expected)
    assert torch.equal(layer(*inputs), expected)


@pytest.mark.parametrize("tiles", [False, True])
def test_processors_with_tiles_prefer_the_library_in_bfloat16(
    tiles: bool, fresh_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = Operators(lambda weight: weight, lambda x, _, weight, bias, __: F.linear(x, weight, bias), 1, 512)
    ours = marked._replace(is_ours=True)
    monkeypatch.setattr(frozen_linear, "_has_tiles", lambda: tiles)
    monkeypatch.setattr(frozen_linear, "_ours", lambda _: ours)
    monkeypatch.setattr(frozen_linear, "_onednn", lambda _: marked)
    assert _operators(torch.bfloat16) is (marked if tiles else ours)
    assert _operators(torch.float32) is ours


@needs_ours
def test_processors_without_such_vectors_do_without(fresh_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, "-mno-avx2"])
    assert packed_gemm.library() is None


@needs_ours
def test_code_that_cannot_be_kept_is_not_used(
    fresh_operators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert packed_gemm.library() is None
    assert _operators(torch.float32) is not None or not torch.backends.mkl.is_available()


@needs_ours
def test_what_is_no_library_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    found = native_code.load(packed_gemm.SOURCE)
    assert found is not None
    whole = Path(found._name)
    other = tmp_path / "two" / whole.relative_to(tmp_path / "one")
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another system's")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    again = native_code.load(packed_gemm.SOURCE)
    assert again is not None
    assert again._name == str(other)


@needs_ours
@pytest.mark.parametrize("changed", ["packed_gemm.cpp", "vectors.h"])
def test_what_has_changed_is_compiled_anew(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("packed_gemm.cpp", "deltas.h", "vectors.h"):
        (tmp_path / name).write_text(packed_gemm.SOURCE.with_name(name).read_text())
    before, same = (native_code.load(tmp_path / "packed_gemm.cpp") for _ in range(2))
    with (tmp_path / changed).open("a") as file:
        file.write("// another comment\n")
    after = native_code.load(tmp_path / "packed_gemm.cpp")
    assert before is not None
    assert same is not None
    assert after is not None
    assert before._name == same._name != after._name


@needs_ours
def test_what_does_not_fit_a_weight_is_refused() -> None:
    packed = packed_gemm.pack_weight(torch.randn(4, 5))
    for x in (torch.randn(3, 6), torch.randn(3, 5).double(), torch.randn(5)):
        with pytest.raises(ValueError, match=r"expected torch\.float32"):
            packed_gemm.multiply(x, packed_gemm.Product(packed, 4))


def test_weights_are_packed_where_there_is_memory_for_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    needed = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    for free, expected in ((4 * needed, 1), (4 * needed - 4, 0), (8 * needed, 2), (100 * needed, 2)):
        monkeypatch.setattr(frozen_linear, "free_bytes", lambda device, free=free: free)
        assert packed_copies(model) == expected
    with torch.device("meta"):
        assert not packed_copies(torch.nn.Linear(3, 4))


def test_layers_of_a_bank_pack() -> None:
    policy = tiny_policy("llama", ["a"])
    assert policy.bank.copies
    layers = [m for m in policy.model.modules() if isinstance(m, LoRALinear)]
    assert layers
    assert all(layer.product is not None and layer.product.copies for layer in layers)
