"""The layers of a decoding step, compiled: in place of some 75 small operations each, a few fused ones.

What a layer does is made a `Program` once (`program.py`), for all rows, prompts and lengths; layers that do the same
with other weights share it, so that it takes seconds, not minutes. This happens on made-up rows, always the same ones,
so that it comes out alike in every process, and is compared there with the layers themselves.

Left to the layers are steps in which a single row or a single prompt is left, batches that mix adapters, and models
whose layers cannot be followed, such as experts that ask how many tokens they were given.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rl_lora.attention.decode_layer import DecodeLayer
from rl_lora.attention.kv_cache import DecodeCache, KeyValues
from rl_lora.kernels.native_code import dispatched
from rl_lora.kernels.verify import difference
from rl_lora.lora.adapter import Adapter
from rl_lora.lora.layers import LoRALinear
from rl_lora.policy.hooks import Forward, forwards, layers_of
from rl_lora.policy.policy import Policy
from rl_lora.sampler.program import Program, Tape

WORTH_COMPILING = 1000
"""Decoding steps. On two CPU cores one step gains 20 to 30 ms, and to compile takes about 10 s."""
ROWS, PROMPTS, PROMPT, OWN = 67, 11, 41, 20
"""Of the step that layers are followed in: rows, prompts, tokens of a prompt and of a row. No model has a dimension of
67, so what has it is known to be one of rows."""

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
    """The layers of a policy in decoding steps."""

    def __init__(self, policy: Policy):
        self.policy, self.layers = policy, layers_of(policy.backbone)
        self.programs: dict[str, Program] = {}
        """By the tape of what they do."""
        self.failed: str | None = None
        self._calls: weakref.WeakKeyDictionary[Any, dict[tuple[bool, ...], dict[nn.Module, Call]]] = (
            weakref.WeakKeyDictionary()
        )

    @contextmanager
    def stepping(self, decode: DecodeCache, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside, the layers run compiled where this step of `decode`, which has begun, allows it."""
        calls = self._calls_for(decode, adapters)
        if calls is None:
            yield
            return
        with forwards(list(calls), lambda layer, forward: partial(_run, calls[layer], decode, forward)):
            yield

    def _calls_for(self, decode: DecodeCache, adapters: Sequence[str | None]) -> dict[nn.Module, Call] | None:
        """What each layer runs; compiled now, if need be."""
        single = decode.single_nodes()
        if self.failed or single is None or any(adapter != adapters[0] for adapter in adapters):
            return None
        adapter = None if adapters[0] is None else self.policy.bank[adapters[0]]
        if adapter is not None and self.policy.dtype != adapter.flat.dtype:
            adapter.cast(self.policy.dtype)  # programs read it as it is now
        of_adapter = self._calls.setdefault(self if adapter is None else adapter, {})
        if single not in of_adapter:
            try:
                of_adapter[single] = self._prepare(decode, adapter, single)
            except Exception as error:  # whatever a foreign model, or a compiler, may raise: the layers are right
                self.failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                warnings.warn(f"decoding goes on without compiled layers: {self.failed}", stacklevel=2)
                return None
        return of_adapter[single]

    def _prepare(self, like: DecodeCache, adapter: Adapter | None, single: tuple[bool, ...]) -> dict[nn.Module, Call]:
        """Follow every layer through a step, compile what is new, and compare.

        Raises:
            ValueError: the compiled step differs, or depends on more than the tensors it is given and weights.
        """
        policy = self.policy
        factors = [] if adapter is None else [x for f in adapter.factors.values() for x in f.to(policy.dtype)]
        adapters = [None if adapter is None else adapter.name] * ROWS
        decode, tokens = _example(like, single, policy)
        positions = decode.begin()
        seen: dict[nn.Module, tuple[Forward, tuple[Any, ...], dict[str, Any], int]] = {}

        def watch(layer: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                with decode.watched() as used:
                    result = forward(*args, **kwargs)
                if numbers := [x for x in (*args, *kwargs.values()) if type(x) in (int, float)]:
                    raise ValueError(f"{type(layer).__name__} is given {numbers}, which may be others in each step")
                if len(used) != 1:
                    raise ValueError(f"{type(layer).__name__} reads the keys of {len(used)} layers")
                seen[layer] = forward, args, kwargs, used.pop()
                return result

            return run

        with forwards(self.layers, watch):
            policy.hidden(tokens, adapters, decode, positions, decode)
        if not seen:
            raise ValueError("transformers does not say what the model's layers are")
        products = [m.product for m in policy.model.modules() if isinstance(m, LoRALinear) and m.product is not None]
        packed = [product.packed for product in products if product.packed is not None]
        weights = {_storage(x) for x in (*policy.model.parameters(), *policy.model.buffers(), *factors, *packed)}
        calls = {}
        with policy.setting(adapters, decode), dispatched():
            for layer, (forward, args, kwargs, i) in seen.items():
                alone = _alone(forward, args, kwargs, decode)
                given, layout = _tensors(args, kwargs), decode.layer(i)
                inputs = [*given, *layout.tensors()]
                tape = Tape(inputs)
                with tape:
                    result = alone(*inputs)
                expected = [*tree_leaves(result), *layout.written()]
                for x in tape.constants:
                    if _storage(x) not in weights:
                        raise ValueError(f"layer {i} reads a tensor {tuple(x.shape)} that may be another in each step")
                text = "\n".join(tape.lines)
                if text not in self.programs:
                    of_rows = [tuple(d for d, n in enumerate(x.shape) if n == ROWS) for x in given]
                    self.programs[text] = Program.of(alone, inputs, [*of_rows, *layout.dynamic()], tape.constants)
                program = self.programs[text]
                calls[layer] = Call(program, i, [tape.constants[k] for k in program.order])
                layout.forget()
                found = [*tree_leaves(program.function(*inputs, *calls[layer].constants)), *layout.written()]
                gap = max(difference(a, b) for a, b in zip(found, expected, strict=True))
                if not gap <= TOLERANCE[policy.dtype]:
                    raise ValueError(f"what layer {i} computes differs by {gap:.2g} of its spread")
        return calls


@dataclass
class Call:
    """A layer's program, and what of it is its own."""

    program: Program
    layer: int
    constants: list[Tensor]


def _run(call: Call, decode: DecodeCache, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """In the place of a layer's forward."""
    inputs = [*_tensors(args, kwargs), *decode.layer(call.layer).tensors()]
    if not call.program.holds(inputs):
        return forward(*args, **kwargs)
    return call.program.function(*inputs, *call.constants)


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


def _alone(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], decode: DecodeCache) -> Callable[..., Any]:
    """A layer's forward as a function of tensors: `_tensors`, and those of its `DecodeLayer`."""
    n = len(_tensors(args, kwargs))

    def alone(*inputs: Tensor) -> Any:
        given, layout = list(inputs[:n]), DecodeLayer.of(inputs[n:])

        def replaced(x: Any) -> Any:
            if isinstance(x, Tensor):
                return given.pop(0)
            if isinstance(x, tuple):
                return tuple(given.pop(0) for _ in x)
            return layout if x is decode else x

        new = [replaced(x) for x in args]
        return forward(*new, **{name: replaced(x) for name, x in kwargs.items()})

    return alone


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
