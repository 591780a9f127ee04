"""Where the time of a stage goes, by kind of work: what stands between it and the hardware's limit.

`torch.profiler` says how long each operation took and on which shapes. `OPERATIONS` says what kind of work an operation
is, by its name; a product is known by the shapes of the weights it is with.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rl_lora.kernels import tree_attention
from rl_lora.kernels.native_code import dispatched
from rl_lora.policy.policy import Policy
from rl_lora.sampler.rows import SAMPLING_NAME

BASE, HEAD, ADAPTER = "products with the base's weights", "products with the head", "products with the adapter"
ATTENTION, VOCABULARY = "attention", "draws and log-probabilities"
ELEMENTWISE, REST = "fused and elementwise operations", "between operations: Python, dispatch"
KINDS = BASE, HEAD, ADAPTER, ATTENTION, VOCABULARY, ELEMENTWISE, REST

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_grouped_mm")
"""Products with weights that their shapes tell apart."""
FROZEN = ("rl_lora::frozen_linear*", "mkl::_mkl_linear", "mkldnn::_linear_pointwise")
"""Products with frozen weights (`rl_lora/kernels/frozen_linear.py`); they may add the adapter's part themselves."""
OPERATIONS = {
    VOCABULARY: (SAMPLING_NAME, "rl_lora::draw*", "rl_lora::vocabulary*", "rl_lora::*logprobs*", "_TokenLogprobs*"),
    ATTENTION: (
        *("rl_lora::decode_attention*", f"{tree_attention.NAME}*", "_PaddedAttention*"),
        *("aten::bmm", "aten::baddbmm", "*_fused_*softmax*", "aten::_softmax", "aten::_softmax_backward_data"),
    ),
    ADAPTER: ("_AdaptedLinear*", "rl_lora::*delta*", "rl_lora::*outer*"),
    ELEMENTWISE: ("rl_lora::rms_norm*", "rl_lora::rotary*", "rl_lora::gated*", "*_fused_*"),
    REST: (
        *("## Call CompiledFxGraph*", "AOTDispatcher*", "*autograd::*", "*Backward*", "_[A-Z]*", "Optimizer.*"),
        *("aten::empty*", "aten::new_empty*", "aten::resize_", "aten::set_"),
        *("aten::*view", "aten::*reshape*", "aten::as_strided", "aten::transpose", "aten::t", "aten::permute"),
        *("aten::slice", "aten::select", "aten::narrow", "aten::expand*", "aten::*squeeze*", "aten::detach*"),
        *("aten::split*", "aten::chunk", "aten::unbind", "aten::unflatten", "aten::resolve_*", "aten::to"),
        *("aten::matmul", "aten::linear", "aten::contiguous", "aten::result_type", "aten::item", "detach*"),
    ),
}
"""Names of operations by the kind of their work; `*` stands for anything, and the first kind that knows a name counts.
Operations that are called by one of the first two kinds are of that kind. All others are elementwise."""


@dataclass(frozen=True)
class Part:
    """One kind of work: seconds, and operations."""

    kind: str
    seconds: float
    n: int


@contextmanager
def naming_fused_kernels() -> Iterator[None]:
    """Layers that are compiled inside name their fused kernels in a profile. Without, these count as Python."""
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.enable_kernel_profile": True}):
        yield


def breakdown(policy: Policy, work: Callable[[], object]) -> list[Part]:
    """Do the work under the profiler. On a GPU the time is the device's, and the rest is what it stood still."""
    on_gpu = policy.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with dispatched(), profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    kinds = dict.fromkeys(KINDS, (0.0, 0))
    weights = WeightShapes.of(policy)
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:  # a GPU's own are those of the operations that started them
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(weights, callers(event), event.input_shapes or (), any(map(is_product, event.cpu_children)))
        before = kinds[kind]
        kinds[kind] = before[0] + microseconds / 1e6, before[1] + 1
    parts = [Part(kind, *kinds[kind]) for kind in KINDS if kind != REST]
    return [*parts, Part(REST, max(0.0, seconds - sum(part.seconds for part in parts)), 0)]


def callers(event: Any) -> list[str]:
    """The name of an operation, and of those that called it, from the inside out."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def is_product(event: Any) -> bool:
    return is_any(event.name, (*PRODUCTS, *FROZEN))


@functools.cache
def is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class WeightShapes:
    """The shapes of a policy's weights, each as a set, since products are with a weight or with its transpose."""

    base: set[frozenset[int]]
    head: set[frozenset[int]]
    """Of the head, and of the pieces it is multiplied in."""
    ranks: set[int]
    features: set[int]
    """Inputs and outputs of the layers that adapters stand on."""

    @classmethod
    def of(cls, policy: Policy) -> WeightShapes:
        base = {frozenset(p.shape[-2:]) for p in policy.model.parameters() if p.dim() > 1}
        parts = [policy.head.weight, *(linear.weight for _, linear in policy.head.parts)]
        inside = {frozenset((site.out_features, site.in_features)) for site in policy.bank.sites.values()}
        head = {frozenset(weight.shape) for weight in parts} - inside
        ranks = {rank for adapter in policy.bank.adapters.values() for rank in adapter.ranks.values()}
        features = {n for site in policy.bank.sites.values() for n in (site.in_features, site.out_features)}
        return cls(base - head, head, ranks, features)


def kind_of(
    weights: WeightShapes, names: Sequence[str], shapes: Sequence[Any] = (), has_product_inside: bool = False
) -> str:
    """names: of the operation, then of its callers. shapes: of its inputs, lists of sizes."""
    name = names[0]
    matrices = [frozenset(shape) for shape in shapes if len(shape) == 2]
    if is_any(name, FROZEN):
        if has_product_inside:  # its own time is that of its Python
            return REST
        return HEAD if weights.head.intersection(matrices) else BASE
    sizes = frozenset().union(*matrices)
    of_rank = bool(sizes & weights.ranks and sizes & weights.features)
    if is_any(name, PRODUCTS) or (name == "aten::addcmul_" and of_rank):
        for kind, known in ((HEAD, weights.head), (BASE, weights.base)):
            if known.intersection(matrices):
                return kind
        return ADAPTER if of_rank else ELEMENTWISE  # such as the angles of a rotary embedding
    for kind in (VOCABULARY, ATTENTION):
        if any(is_any(caller, OPERATIONS[kind]) for caller in names[1:]):
            return kind
    return next((kind for kind, patterns in OPERATIONS.items() if is_any(name, patterns)), ELEMENTWISE)


def breakdown_table(title: str, parts: list[Part]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "seconds", "share", "operations"):
        table.add_column(name, justify="left" if not name else "right")
    total = sum(part.seconds for part in parts)
    for part in parts:
        table.add_row(part.kind, f"{part.seconds:.2f}", f"{part.seconds / total:.0%}", str(part.n or ""))
    return table
