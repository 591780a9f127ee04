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

from rl_lora.kernels import frozen_linear, native_code, packed_gemm
from rl_lora.kernels.frozen_linear import MOST_ROWS, FrozenLinear, Operators, _operators, packed_copies
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


@needs_ours
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 800), (33, 2000), (1, 1)])
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(exact: bool, biased: bool, n_out: int, n_in: int) -> None:
    """To the bit, whatever the number of rows and threads; where bfloat16 holds the weight, and where not."""
    g = torch.Generator().manual_seed(n_out)
    weight, bias = torch.randn(n_out, n_in, generator=g), torch.randn(n_out, generator=g) if biased else None
    if exact:
        weight = weight.bfloat16().float()
    layer = FrozenLinear(weight, bias, copies=2)
    x = torch.randn(MOST_ROWS, n_in, generator=g)
    wide = torch.full((MOST_ROWS, 2 * n_out), torch.nan)
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = layer(x)
        exact_products = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(whole.double(), exact_products, atol=1e-5 * math.sqrt(n_in), rtol=1e-6)
        layer(x, out=wide[:, n_out:])
        assert torch.equal(wide[:, n_out:], whole)
        assert wide[:, :n_out].isnan().all()
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(layer(x, out=torch.empty(MOST_ROWS, n_out, dtype=dtype)), whole.to(dtype))
        try:
            for threads, n in ((1, 1), (1, 13), (2, 29), (5, 1), (7, 64), (3, MOST_ROWS)):
                torch.set_num_threads(threads)
                start = int(torch.randint(MOST_ROWS - n + 1, (), generator=g))
                assert torch.equal(layer(x[start : start + n]), whole[start : start + n])
        finally:
            torch.set_num_threads(before)
    assert layer.packed is not None
    assert layer.packed.dtype == (torch.bfloat16 if exact else torch.float32)


@needs_ours
@pytest.mark.parametrize(("lanes", "flag"), VECTORS)
def test_vectors_of_other_processors(
    lanes: int, flag: str, fresh_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_code, "FLAGS", [*native_code.FLAGS, flag])
    found = packed_gemm.library()
    assert found is not None
    assert found.lanes() == lanes
    for shape in ((192, 576), (7, 5)):
        test_it_is_the_product_whatever_the_number_of_rows(torch.float32, True, *shape)
        test_a_row_of_a_product_does_not_depend_on_its_neighbours(True, False, *shape)


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
