"""A layer, compiled: traced once by torch's tracer and compiled by its compiler, for tensors of many sizes.

Its weights are inputs: a layer that does the same with other weights, which two traces tell, shares it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rl_lora.kernels.frozen_linear import join_products
from rl_lora.system.cache_folder import place_compiler_cache

MOST_SIZES = 1 << 12
"""Sizes of inputs of which it is remembered whether a compiled layer holds for them."""


class OperationTrace(TorchDispatchMode):
    """Records operations as lines of text that do not depend on the weights they are done with.

    `constants` are the tensors that were neither among the inputs nor made on the way, in the order of their first use.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.lines: list[str] = []
        self.constants: list[Tensor] = []
        self._alive: list[Tensor] = list(inputs)  # a freed tensor's id would be taken for one that was seen
        self._names = {id(x): f"input {i}" for i, x in enumerate(inputs)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(self._name, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for i, x in enumerate(tree_leaves(result)):
            if isinstance(x, Tensor) and id(x) not in self._names:
                self._add(x, f"result {len(self.lines)}.{i}")
        self.lines.append(f"{func} {given}")
        return result

    def _name(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._names:
            self._add(x, f"constant {len(self.constants)} {tuple(x.shape)} {x.dtype}")
            self.constants.append(x)
        return self._names[id(x)]

    def _add(self, x: Tensor, name: str) -> None:
        self._names[id(x)] = name
        self._alive.append(x)


class CompiledLayer:
    """A layer's operations, compiled: a function of its inputs and constants.

    `order`: which of the trace's constants it takes. It holds for inputs of other sizes than those it was made from as
    far as `holds` says.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        order: list[int],
        symbols: list[tuple[int, int]],
        allows: Callable[[tuple[int, ...]], bool],
    ):
        self.function, self.order = function, order
        self._symbols, self._allows = symbols, allows
        self._held: dict[tuple[int, ...], bool] = {}

    @classmethod
    def of(
        cls,
        alone: Callable[..., Any],
        inputs: Sequence[Tensor],
        dynamic: Sequence[tuple[int, ...]],
        constants: Sequence[Tensor],
    ) -> CompiledLayer:
        """`dynamic`: the dimensions of each input whose size may change.

        Raises:
            ValueError: an input is not contiguous.
        """
        if not all(x.is_contiguous() for x in inputs):
            raise ValueError("a layer is given tensors that are not contiguous")
        place_compiler_cache()
        from torch._dispatch.python import enable_python_dispatcher
        from torch._inductor import compile as compile_graph
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)

        def fake(x: Tensor, dynamic: Sequence[int]) -> Tensor:
            sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(x.dim())]
            return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

        symbolic = [fake(x, dims) for x, dims in zip(inputs, dynamic, strict=True)]
        with enable_python_dispatcher(), mode:
            graph = make_fx(alone)(*symbolic)
        order = _lift(graph, constants)
        join_products(graph.graph)
        graph.recompile()
        # `holds` looks at what it is given; the compiler's own checks, of every tensor in every call, are not needed.
        options = {"size_asserts": False}
        function = compile_graph(graph, [*symbolic, *(fake(constants[k], ()) for k in order)], options=options)
        sizes: dict[tuple[int, int], Any] = {
            (i, d): n for i, x in enumerate(symbolic) for d, n in enumerate(x.shape) if isinstance(n, torch.SymInt)
        }
        # What the tracer and the compiler have relied on: no more rows than products are packed for, for example.
        guards = env.produce_guards_expression(list(sizes.values()))
        return cls(
            function,
            order,
            list(sizes),
            lambda found: guards is None or bool(env.evaluate_guards_expression(guards, found)),
        )

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Whether it was compiled for inputs of these sizes too. A size of one it was not: that is another trace."""
        if not all(x.is_contiguous() for x in inputs):
            return False
        sizes = tuple(inputs[i].shape[d] for i, d in self._symbols)
        if sizes not in self._held:
            if len(self._held) == MOST_SIZES:
                self._held.clear()
            self._held[sizes] = min(sizes) > 1 and self._allows(sizes)
        return self._held[sizes]


def _lift(graph: torch.fx.GraphModule, constants: Sequence[Tensor]) -> list[int]:
    """Make inputs, behind the others, of the tensors that a graph has in it; which of `constants` they are."""
    place = {id(x): i for i, x in enumerate(constants)}
    order: list[int] = []
    lifted: dict[str, torch.fx.Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in lifted:
            order.append(place[id(getattr(graph, node.target))])
            with graph.graph.inserting_after(last):
                last = lifted[node.target] = graph.graph.placeholder(f"constant{len(lifted)}")
        node.replace_all_uses_with(lifted[node.target])
        graph.graph.erase_node(node)
    for name in lifted:
        delattr(graph, name)
    return order
