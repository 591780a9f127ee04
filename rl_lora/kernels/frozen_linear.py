"""Products with weights that never change, rearranged once for reading on a CPU, and the deltas of adapters on them.

They are computed by `packed_gemm.py` where it can be compiled, else by the CPU's matrix library. The library rearranges
a weight before it multiplies, a fifth of the time for the few rows of a decode step; torch has operators that do so
beforehand, made for its compiler's frozen models, and not public. Either is used once it has been verified.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lora.kernels import packed_gemm
from rl_lora.kernels.native_code import OPERATIONS, is_dispatched
from rl_lora.kernels.packed_gemm import Product
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.kernels.verify import FastPath, require_all_close
from rl_lora.system.memory import free_bytes

ROWS = 128
"""Rows that the library packs weights for. Other numbers can be multiplied as well."""
MOST_ROWS = 512
"""Up to so many rows it pays in float32, and with the library's packed weights."""
SHARE = 0.25
"""Share of the free memory that packed copies may take."""


class Operators(NamedTuple):
    """How weights of a dtype are packed and multiplied."""

    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    """x (N, in), packed, weight (out, in), bias (out,), tensor to write to or None -> (N, out)."""
    least_rows: int
    most_rows: float
    """The numbers of rows with which it is faster than torch's own product."""
    is_ours: bool = False
    """`packed_gemm.multiply` does it, which adds deltas on the way."""


class FrozenLinear:
    """x W^T + b for a weight (out, in) that is not trained. Where gradients are asked for, torch's own product.

    A weight that is written to is packed anew; a write through its `.data` is not noticed.

    Args:
        copies: so many packed copies of the weight have room in memory: one, and in bfloat16 one for gradients.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, copies: int = 0):
        self.weight, self.bias, self.copies = weight, bias, copies
        self.packed: Tensor | None = None
        """The packed weight, after the first product."""
        self._version = -1

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out), in `out` where that is given: it may be of another dtype."""
        if (operators := self._ready(x.shape[0])) is None:
            return _written(F.linear(x, self.weight, self.bias), out)
        assert self.packed is not None
        if not is_dispatched():
            return operators.multiply(x, self.packed, self.weight, self.bias, out)
        result, _ = torch.ops.rl_lora.frozen_linear(x, self.packed, self.weight, self.bias, None, None, None, None)
        return _written(result, out)

    def add_deltas(self, x: Tensor, deltas: RowDeltas) -> tuple[Tensor, Tensor]:
        """(N, in) -> (N, out) with the deltas of adapters, and z of those, float32 (N, >= most); no gradients."""
        packed = None if self._ready(x.shape[0]) is None else self.packed
        if not is_dispatched():
            return _with_deltas(x, packed, self.weight, self.bias, deltas)
        of = deltas.A, deltas.B, deltas.first, deltas.count
        return torch.ops.rl_lora.frozen_linear(x, packed, self.weight, self.bias, *of)

    @functools.cached_property
    def turned(self) -> FrozenLinear:
        """x W, as the gradient with respect to x asks for."""
        copies = max(0, self.copies - 1) if self.weight.dtype == torch.bfloat16 else 0
        return FrozenLinear(self.weight.t(), None, copies)

    def _ready(self, n: int) -> Operators | None:
        """What multiplies n rows with the packed weight, after that has been brought up to date; None: torch does."""
        if not self.copies or torch.is_grad_enabled() or not n:
            return None
        operators = _operators(self.weight.dtype)
        if operators is None or not self.weight.numel() or self.weight.device.type != "cpu":
            self.copies = 0
            return None
        if not operators.least_rows <= n <= operators.most_rows:
            return None
        if self.packed is None or self._version != self.weight._version:
            self.packed, self._version = operators.pack(self.weight), self.weight._version
        return operators


def _with_deltas(
    x: Tensor, packed: Tensor | None, weight: Tensor, bias: Tensor | None, deltas: RowDeltas
) -> tuple[Tensor, Tensor]:
    """packed: None where torch multiplies."""
    if packed is None:
        y = F.linear(x, weight, bias)
        return y, packed_gemm.add_deltas(x, deltas, y)
    operators = _operators(weight.dtype)
    assert operators is not None
    if operators.is_ours:
        y, z = packed_gemm.multiply(x, Product(packed, weight.shape[0], bias, deltas))
        assert z is not None
        return y, z
    y = operators.multiply(x, packed, weight, bias, None)
    return y, packed_gemm.add_deltas(x, deltas, y)


def _frozen_linear(
    x: Tensor,
    packed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    first: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if A is None or B is None or first is None or count is None:
        operators = _operators(weight.dtype)
        assert operators is not None
        assert packed is not None
        return operators.multiply(x, packed, weight, bias, None), x.new_empty(0, dtype=torch.float32)
    return _with_deltas(x, packed, weight, bias, RowDeltas(A, B, first, count, len(A)))


# torch's compiler knows the library's operators as made by itself only, and passes no symbolic sizes on to them.
OPERATIONS.define(
    "frozen_linear(Tensor x, Tensor? packed, Tensor weight, Tensor? bias, Tensor? A, Tensor? B, Tensor? first, "
    "Tensor? count) -> (Tensor, Tensor)"
)
for key in ("CPU", "MkldnnCPU"):  # what oneDNN has packed is of the second kind
    OPERATIONS.impl("frozen_linear", _frozen_linear, key)
torch.library.register_fake(
    "rl_lora::frozen_linear",
    lambda x, _, weight, __, A, *___: (
        x.new_empty(x.shape[0], weight.shape[0]),  # `len` would be a number to the tracer, not a size that may change
        x.new_empty(*((0,) if A is None else (x.shape[0], A.shape[0])), dtype=torch.float32),
    ),
    lib=OPERATIONS,
)


def _frozen_linears(
    x: Tensor,
    packed: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    A: list[Tensor],
    B: list[Tensor],
    first: list[Tensor],
    count: list[Tensor],
) -> list[Tensor]:
    operators = _operators(weights[0].dtype)
    if operators is None or not operators.is_ours or any(p.dtype != packed[0].dtype for p in packed):
        each = zip(packed, weights, biases, A, B, first, count, strict=True)
        return [_frozen_linear(x, *of_one)[0] for of_one in each]
    deltas = map(RowDeltas, A, B, first, count, [a.shape[0] for a in A])
    products = map(Product, packed, [weight.shape[0] for weight in weights], biases, deltas)
    return [y for y, _ in packed_gemm.multiply_all(x, list(products))]


OPERATIONS.define(
    "frozen_linears(Tensor x, Tensor[] packed, Tensor[] weights, Tensor?[] biases, Tensor[] A, Tensor[] B, "
    "Tensor[] first, Tensor[] count) -> Tensor[]"
)
for key in ("CPU", "MkldnnCPU"):
    OPERATIONS.impl("frozen_linears", _frozen_linears, key)
torch.library.register_fake(
    "rl_lora::frozen_linears",
    lambda x, _, weights, *__: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights],
    lib=OPERATIONS,
)


def join_products(graph: torch.fx.Graph) -> None:
    """Make one operation of a traced program's products of the same rows: of queries, keys and values, for example."""
    alike: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.rl_lora.frozen_linear.default and None not in (node.args[1], *node.args[4:]):
            x, *rest = node.all_input_nodes
            if all(given.op == "placeholder" for given in rest):
                alike.setdefault(x, []).append(node)
    for x, nodes in alike.items():
        if len(nodes) == 1:
            continue
        of_each = [list(column) for column in zip(*(node.args[1:] for node in nodes), strict=True)]
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(torch.ops.rl_lora.frozen_linears.default, (x, *of_each))
            found = [graph.call_function(operator.getitem, (together, i)) for i in range(len(nodes))]
        for node, result in zip(nodes, found, strict=True):
            for part in list(node.users):  # the product, and z, which a decode step has no use for
                if part.args[1] == 0:
                    part.replace_all_uses_with(result)
                graph.erase_node(part)
            graph.erase_node(node)
    graph.lint()


def packed_copies(model: nn.Module) -> int:
    """How many packed copies of all linear layers to make room for, two at most: none but on a CPU with the memory."""
    weights = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    if any(weight.device.type != "cpu" for weight in weights):
        return 0
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    return min(2, int(SHARE * free_bytes(torch.device("cpu")) // max(1, needed)))


@functools.cache
def _operators(dtype: torch.dtype) -> Operators | None:
    """The first that computes what it should on this machine."""
    of_bfloat16 = (_onednn, _ours) if _has_tiles() else (_ours, _onednn)
    for candidate in {torch.float32: (_ours, _mkl), torch.bfloat16: of_bfloat16}.get(dtype, ()):
        path = FastPath("weights are packed in another way, or not at all", absent=(AttributeError, RuntimeError))
        operators = path.attempt(partial(candidate, dtype))
        if operators is not None and path.verify(partial(_compare, operators, dtype)):
            return operators
    return None


def _has_tiles() -> bool:
    """Whether this CPU multiplies tiles (AMX), as oneDNN does and `packed_gemm.cpp` does not."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def _ours(dtype: torch.dtype) -> Operators | None:
    if packed_gemm.library() is None:
        return None
    return Operators(
        packed_gemm.pack_weight,
        lambda x, packed, weight, bias, out: packed_gemm.multiply(x, Product(packed, len(weight), bias), out)[0],
        least_rows=1,
        most_rows=MOST_ROWS if dtype == torch.float32 else float("inf"),
        is_ours=True,
    )


def _mkl(_: torch.dtype) -> Operators:
    pack, multiply = torch.ops.mkl._mkl_reorder_linear_weight.default, torch.ops.mkl._mkl_linear.default
    return Operators(
        lambda weight: pack(weight.contiguous(), ROWS),
        lambda x, packed, weight, bias, out: _written(multiply(x, packed, weight, bias, len(x)), out),
        least_rows=2,
        most_rows=MOST_ROWS,
    )


def _onednn(_: torch.dtype) -> Operators:
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    return Operators(
        lambda weight: pack(weight.contiguous(), ROWS),
        lambda x, packed, weight, bias, out: _written(multiply(x, packed, bias, "none", [], ""), out),
        least_rows=2,
        most_rows=MOST_ROWS,
    )


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _compare(operators: Operators, dtype: torch.dtype) -> None:
    """With float64, for few rows and many, with sizes that are no multiples of anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n_out, n_in, held in ((192, 576, dtype), (203, 1637, torch.bfloat16)):
            weight, bias = torch.randn(n_out, n_in, generator=generator), torch.randn(n_out, generator=generator)
            weight, bias = weight.to(held).to(dtype), bias.to(dtype)
            packed = operators.pack(weight)
            for n in (operators.least_rows, 67, ROWS, MOST_ROWS):
                x = torch.randn(n, n_in, generator=generator).to(dtype)
                exact = F.linear(x.double(), weight.double(), bias.double())
                tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
                product = operators.multiply(x, packed, weight, bias, None)
                require_all_close(f"a product of {n} rows differs from that in float64", product, exact, tolerance)
