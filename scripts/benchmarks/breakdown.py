"""Where the time of a stage goes, by kind of work: what stands between it and the hardware's limit.

`torch.profiler` says how long each operation took and on which shapes; a product is known by the weights it is with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from rl_lora.kernels import tree_attention
from rl_lora.kernels.native_code import dispatched
from rl_lora.policy.policy import Policy

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::_grouped_mm"}
PACKED = {"rl_lora::frozen_linear", "mkl::_mkl_linear", "mkldnn::_linear_pointwise"}
"""Products with frozen weights (`rl_lora/kernels/frozen_linear.py`)."""
ATTENDING = {"aten::bmm", "aten::baddbmm", "rl_lora::decode_attention", tree_attention.NAME}
BASE, ADAPTER, HEAD = "products with the base's weights", "products with the adapter", "products with the head"
ATTENTION, OTHER, REST = "attention, its products at least", "other operations", "between operations: Python, dispatch"


@dataclass(frozen=True)
class Part:
    """One kind of work: seconds, and operations."""

    kind: str
    seconds: float
    n: int


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
    kinds: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(policy, event.key, event.input_shapes)
        before = kinds.get(kind, (0.0, 0))
        kinds[kind] = before[0] + microseconds / 1e6, before[1] + event.count
    parts = [Part(kind, *kinds.get(kind, (0.0, 0))) for kind in (BASE, HEAD, ADAPTER, ATTENTION, OTHER)]
    return [*parts, Part(REST, max(0.0, seconds - sum(part.seconds for part in parts)), 0)]


def kind_of(policy: Policy, operation: str, shapes: Iterable[Any]) -> str:
    """shapes: of the operation's inputs, lists of sizes."""
    if operation in ATTENDING:
        return ATTENTION
    matrices = [tuple(shape) for shape in shapes if len(shape) == 2]
    if operation in PACKED:
        of_head = {tuple(linear.weight.shape) for _, linear in policy.head.parts}
        of_base = {(site.out_features, site.in_features) for site in policy.bank.sites.values()}
        return HEAD if set(matrices) & (of_head - of_base) else BASE
    if operation not in PRODUCTS and operation != "aten::addcmul_":
        return OTHER
    ranks = {rank for adapter in policy.bank.adapters.values() for rank in adapter.ranks.values()}
    if any(ranks & set(shape) for shape in matrices):
        return ADAPTER
    if operation == "aten::addcmul_":
        return OTHER
    V, d = policy.head.weight.shape
    return HEAD if any(set(shape) == {V, d} for shape in matrices) else BASE


def breakdown_table(title: str, parts: list[Part]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "seconds", "share", "operations"):
        table.add_column(name, justify="left" if not name else "right")
    total = sum(part.seconds for part in parts)
    for part in parts:
        table.add_row(part.kind, f"{part.seconds:.2f}", f"{part.seconds / total:.0%}", str(part.n or ""))
    return table
