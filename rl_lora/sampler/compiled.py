"""The layers of a decode step, compiled: in place of some 75 small operations each, a few fused ones.

A layer is compiled once (`compiled_layer.py`), for all numbers of rows and prompts and all lengths. Layers that do the
same with other weights share the result, so that it takes seconds, not minutes. This happens on made-up rows, always
the same ones, so that it comes out alike in every process, and is compared there with the layers themselves.

What adapters add (`RowDeltas`) is an input, so that all adapters share a compiled layer. Where torch adds it instead,
as in float16, batches that mix adapters are not compiled. Nor are steps in which a single row or a single prompt is
left, and models whose layers cannot be traced, such as experts that ask how many tokens they were given.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rl_lora.attention.decode_layer import DecodeLayer
from rl_lora.attention.kv_cache import DecodeCache, KeyValues
from rl_lora.kernels.native_code import dispatched
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.kernels.verify import FastPath, require_close
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.layers import LoRALinear
from rl_lora.policy.hooks import Forward, forwards, layers_of
from rl_lora.policy.policy import Policy
from rl_lora.sampler.compiled_layer import CompiledLayer, OperationTrace

WORTH_COMPILING = 1000
"""Decoding steps. On two CPU cores one step gains 20 to 30 ms, and to compile takes about 10 s."""
ROWS, PROMPTS, PROMPT, OWN = 67, 11, 41, 20
"""Of the step that layers are followed in: rows, prompts, tokens of a prompt and of a row. No model has a dimension of
67, so what has it is known to be one of rows."""

Deltas = Mapping[str, RowDeltas]
"""By the names of sites."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest mean difference in what a layer computes, in standard deviations, that rounding explains."""


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # torch has its own for it
        return f"no C++ compiler was found ({type(error).__name__})"
    return None


def should_compile(wanted: bool | None, device: torch.device | str, decoding_steps: int = 0) -> bool:
    """Whether a sampler should compile the layers of its policy.

    wanted: `model.compile`; None compiles where it pays and can be done. decoding_steps: about how many are to come.

    Raises:
        ValueError: it is wanted, but nothing can be compiled for the device.
    """
    device = torch.device(device)
    compiles = wanted
    if compiles is None:  # on a GPU it has not been measured yet
        compiles = device.type == "cpu" and decoding_steps >= WORTH_COMPILING
    reason = unavailable(device) if compiles else None
    if reason and wanted:
        raise ValueError(f"model.compile is true, but {reason}; install it, or leave model.compile out")
    return compiles and reason is None


class CompiledLayers:
    """The layers of a policy in decode steps."""

    def __init__(self, policy: Policy):
        self.policy, self.layers = policy, layers_of(policy.backbone)
        self.compiled: dict[str, CompiledLayer] = {}
        """By the trace of their operations."""
        self.fast_path = FastPath("decoding goes on without compiled layers")
        self._calls: weakref.WeakKeyDictionary[Any, dict[Any, dict[nn.Module, LayerCall]]] = weakref.WeakKeyDictionary()

    @contextmanager
    def stepping(self, decode: DecodeCache, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside, the layers run compiled where this step of `decode`, which has begun, allows it."""
        deltas = self._deltas(adapters)
        calls = self._calls_for(decode, adapters, deltas)
        if calls is None:
            yield
            return
        with forwards(list(calls), lambda layer, forward: partial(_run, calls[layer], decode, deltas, forward)):
            yield

    def _deltas(self, adapters: Sequence[str | None]) -> Deltas:
        with self.policy.bank.route(adapters):
            return self.policy.bank.deltas(self.policy.dtype)

    def _calls_for(
        self, decode: DecodeCache, adapters: Sequence[str | None], deltas: Deltas
    ) -> dict[nn.Module, LayerCall] | None:
        """What each layer runs; compiled now, if need be."""
        single = decode.single_nodes()
        if self.fast_path.failed or single is None:
            return None
        names = list(dict.fromkeys(adapters))
        adapter = None
        if any(name is not None and not deltas.keys() >= self.policy.bank[name].factors.keys() for name in names):
            if len(names) > 1 or names[0] is None:
                return None
            adapter = self.policy.bank[names[0]]
            if self.policy.dtype != adapter.flat.dtype:
                adapter.cast(self.policy.dtype)  # compiled layers read it as it is now
        of_adapter = self._calls.setdefault(self if adapter is None else adapter, {})
        key = single, frozenset(deltas)
        if key not in of_adapter:
            calls = self.fast_path.attempt(lambda: self._prepare(decode, names, adapter, single))
            if calls is None:
                return None
            of_adapter[key] = calls
        return of_adapter[key]

    def _prepare(
        self, like: DecodeCache, names: Sequence[str | None], adapter: Adapter | None, single: tuple[bool, ...]
    ) -> dict[nn.Module, LayerCall]:
        """Follow every layer through a step with adapters of these names, compile what is new, and compare.

        adapter: the one whose factors the layers read by themselves; None where they are inputs.

        Raises:
            Mismatch: a compiled layer computes something else.
            ValueError: a layer depends on more than the tensors it is given and weights.
        """
        adapters = self._of_rows(names)
        decode, tokens = _example(like, single, self.policy)
        observed = self._observe(decode, tokens, adapters)
        if not observed:
            raise ValueError("transformers does not say what the model's layers are")
        weights, deltas = self._weights(adapter), self._deltas(adapters)
        with self.policy.setting(adapters, decode), dispatched():
            return {layer: self._compile(layer, seen, decode, weights, deltas) for layer, seen in observed.items()}

    def _of_rows(self, names: Sequence[str | None]) -> list[str | None]:
        """What the made-up rows carry: of the adapters on the same sites one, so that all sites are among them."""
        bank = self.policy.bank
        alike = {frozenset[str]() if name is None else frozenset(bank[name].factors): name for name in names}
        chosen = list(alike.values())
        if len(chosen) > ROWS:
            raise ValueError(f"adapters stand on {len(chosen)} different choices of layers, more than {ROWS}")
        return [chosen[i * len(chosen) // ROWS] for i in range(ROWS)]

    def _observe(self, decode: DecodeCache, tokens: Tensor, adapters: list[str | None]) -> dict[nn.Module, Observed]:
        """What each layer is given in the next step of `decode`."""
        observed: dict[nn.Module, Observed] = {}

        def watch(layer: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                with decode.watched() as used:
                    result = forward(*args, **kwargs)
                if numbers := [x for x in (*args, *kwargs.values()) if type(x) in (int, float)]:
                    raise ValueError(f"{type(layer).__name__} is given {numbers}, which may be others in each step")
                if len(used) != 1:
                    raise ValueError(f"{type(layer).__name__} reads the keys of {len(used)} layers")
                observed[layer] = Observed(forward, args, kwargs, used.pop())
                return result

            return run

        positions = decode.begin()
        with forwards(self.layers, watch):
            self.policy.hidden(tokens, adapters, decode, positions, decode)
        return observed

    def _weights(self, adapter: Adapter | None) -> set[int]:
        """The memory of all that is the same in every step: weights, buffers, and their packed copies."""
        model = self.policy.model
        factors = [] if adapter is None else [x for f in adapter.factors.values() for x in f.to(self.policy.dtype)]
        products = [m.product for m in model.modules() if isinstance(m, LoRALinear) and m.product is not None]
        packed = [product.packed for product in products if product.packed is not None]
        return {_storage(x) for x in (*model.parameters(), *model.buffers(), *factors, *packed)}

    def _compile(
        self, layer: nn.Module, seen: Observed, decode: DecodeCache, weights: set[int], deltas: Deltas
    ) -> LayerCall:
        """Compile a layer, unless another one with the same operations has been; and compare it with the layer."""
        sites = [m.name for m in layer.modules() if isinstance(m, LoRALinear) and m.name in deltas]
        given, layout = _tensors(seen.args, seen.kwargs), decode.layer(seen.layer)
        # Sites may share a tensor of rows now, and not in another batch: to the tracer each has its own.
        of_sites = [x.clone() for x in _of_sites(deltas, sites)]
        inputs = [*given, *layout.tensors(), *of_sites]
        n = len(given), len(given) + len(layout.tensors())

        def alone(*inputs: Tensor) -> Any:
            fixed = {
                site: RowDeltas(A, B, first, count, A.shape[0])
                for site, A, B, first, count in zip(sites, *(inputs[n[1] + i :: 4] for i in range(4)), strict=True)
            }
            with self.policy.bank.fixed(fixed):
                return _replaced(seen, decode, inputs[: n[0]], DecodeLayer.of(inputs[n[0] : n[1]]))

        with OperationTrace(inputs) as trace:
            result = alone(*inputs)
        expected = [*tree_leaves(result), *layout.written()]
        for x in trace.constants:
            if _storage(x) not in weights:
                raise ValueError(f"layer {seen.layer} reads a tensor {tuple(x.shape)} that may be another in each step")
        text = "\n".join(trace.lines)
        if text not in self.compiled:
            of_rows = [tuple(d for d, n in enumerate(x.shape) if n == ROWS) for x in given]
            dynamic = [*of_rows, *layout.dynamic(), *[(0,)] * (4 * len(sites))]
            self.compiled[text] = CompiledLayer.of(alone, inputs, dynamic, trace.constants)
        compiled = self.compiled[text]
        call = LayerCall(compiled, seen.layer, sites, [trace.constants[k] for k in compiled.order])
        layout.forget()
        found = [*tree_leaves(compiled.function(*inputs, *call.constants)), *layout.written()]
        for a, b in zip(found, expected, strict=True):
            require_close(f"compiled layer {seen.layer} differs from the layer", a, b, TOLERANCE[self.policy.dtype])
        return call


class Observed(NamedTuple):
    """What a layer is given in a step."""

    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer: int
    """Which of the KV cache it reads."""


@dataclass
class LayerCall:
    """A compiled layer with the weights of one layer of the model."""

    compiled: CompiledLayer
    layer: int
    """Which of the KV cache it reads."""
    sites: list[str]
    """Of its `RowDeltas`."""
    constants: list[Tensor]


def _run(call: LayerCall, decode: DecodeCache, deltas: Deltas, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """In the place of a layer's forward."""
    inputs = [*_tensors(args, kwargs), *decode.layer(call.layer).tensors(), *_of_sites(deltas, call.sites)]
    if not call.compiled.holds(inputs):
        return forward(*args, **kwargs)
    return call.compiled.function(*inputs, *call.constants)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What a layer is given, but for what its keys and values are; tuples of tensors are taken apart."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple):
            found.extend(x)
    return found


def _storage(x: Tensor) -> int:
    """Which memory a tensor looks at."""
    return id(x) if x.is_mkldnn else x.untyped_storage().data_ptr()  # oneDNN does not say where its memory is


def _of_sites(deltas: Deltas, sites: Sequence[str]) -> list[Tensor]:
    """A, B, first and count of each."""
    return [x for site in sites for x in (deltas[site].A, deltas[site].B, deltas[site].first, deltas[site].count)]


def _replaced(seen: Observed, decode: DecodeCache, given: Sequence[Tensor], layout: DecodeLayer) -> Any:
    """A layer's forward with other tensors than those it was seen with, `_tensors`, and another layout."""
    rest = list(given)

    def replaced(x: Any) -> Any:
        if isinstance(x, Tensor):
            return rest.pop(0)
        if isinstance(x, tuple):
            return tuple(rest.pop(0) for _ in x)
        return layout if x is decode else x

    new = [replaced(x) for x in seen.args]
    return seen.forward(*new, **{name: replaced(x) for name, x in seen.kwargs.items()})


def _example(like: DecodeCache, single: tuple[bool, ...], policy: Policy) -> tuple[DecodeCache, Tensor]:
    """Rows of sizes that are always the same, behind as many sources as `like` has; and their next tokens, (R, 1)."""
    generator = torch.Generator().manual_seed(0)
    decode = DecodeCache(policy.device, short_prefix=0)

    def nodes(n: int, length: int) -> KeyValues:
        keys, values = (
            [torch.randn(n, x.shape[1], length, x.shape[3], generator=generator).to(x) for x in xs]
            for xs in (like.keys, like.values)
        )
        return KeyValues(keys, values, np.full(n, length))

    *prefixes, _ = single
    prefix_of_prompt = np.zeros(PROMPTS, np.int64)
    for alone in prefixes:
        n = 1 if alone else 2
        decode.prefixes = nodes(n, PROMPT // 2)
        prefix_of_prompt = np.arange(PROMPTS) % n
    decode.admit(nodes(PROMPTS, PROMPT), prefix_of_prompt, np.sort(np.arange(ROWS) % PROMPTS))
    decode.make_room(OWN)
    decode.advance(np.arange(ROWS) % OWN)
    tokens = torch.randint(policy.head.weight.shape[0], (ROWS, 1), generator=generator)
    return decode, tokens.to(policy.device)
