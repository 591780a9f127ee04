"""The layers that stand in the place of a base's: what the base computes, and the deltas of the adapters on top.

`W + (alpha / r) B A` is never formed: a layer computes `W x + (alpha / r) B (A x)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rl_lora.kernels import adapted_linear
from rl_lora.kernels.frozen_linear import FrozenLinear
from rl_lora.lora.adapter import Adapter, Factors
from rl_lora.lora.routing import MAX_STACKED, CurrentRouting, Routing


class _Wrapper(nn.Module):
    """Stands in the place of a frozen layer. What a model reads off it (weight, in_features, ...) is the base's."""

    def __init__(self, base: nn.Module, name: str, current: CurrentRouting):
        super().__init__()
        self.base, self.name, self.current = base, name, current

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoRALinear(_Wrapper):
    """A frozen linear layer (nn.Linear, a subclass of it, or Conv1D) and the bank's adapters on it.

    Args:
        copies: see `FrozenLinear`.
    """

    def __init__(self, base: nn.Module, name: str, current: CurrentRouting, copies: int):
        super().__init__(base, name, current)
        self.product: FrozenLinear | None = None
        if type(base) is nn.Linear:
            self.product = FrozenLinear(base.weight, base.bias, copies)

    def forward(self, x: Tensor) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])  # (N, in)
        if self.product is not None and adapted_linear.serves(x2.device.type, x2.dtype):
            y2 = self._in_one(x2, self.product)
        else:
            # Deltas are added in place, and to no view: a view's gradient would be copied twice.
            y2 = (self.product or self.base)(x2)  # (N, out)
            if (routing := self.current.routing) is not None:
                self._add_deltas(y2, x2, routing)
        return y2.view(*x.shape[:-1], y2.shape[-1])

    def _in_one(self, x2: Tensor, product: FrozenLinear) -> Tensor:
        found = self.current.deltas(self.name, x2.shape[0], x2.dtype)
        if found is None:
            return adapted_linear.frozen_linear(x2, product)
        deltas, stack = found
        if stack is None:
            return adapted_linear.adapted_linear(x2, product, deltas, (), ())
        factors = [x for of_adapter in stack.factors for x in (of_adapter.A, of_adapter.B)]
        return adapted_linear.adapted_linear(x2, product, deltas, stack.places, factors)

    def _add_deltas(self, y2: Tensor, x2: Tensor, routing: Routing) -> None:
        if routing.only_adapter is not None:
            if (factors := routing.only_adapter.factors.get(self.name)) is not None:
                _add_delta(y2, x2, factors)
            return
        stack = None if torch.is_grad_enabled() else self.current.stack(self.name, x2.dtype)
        if stack is not None and stack.finite and len(stack.A) <= MAX_STACKED:  # 0 * NaN would reach the others' rows
            z = (x2 @ stack.A.t()).masked_fill_(routing.others(stack.ranks, len(x2), x2.device), 0)
            y2.addmm_(z, stack.B)  # zeros add nothing, not even rounding
            return
        for assignment in routing.assignments:
            if (factors := assignment.adapter.factors.get(self.name)) is None:
                continue
            where = routing.tokens(assignment.where, len(x2))
            if isinstance(where, slice):
                _add_delta(y2[where], x2[where], factors)
            else:
                y2.index_copy_(0, where, _add_delta(y2[where], x2[where], factors))


def _add_delta(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """y += scale * x A^T B^T, in place. x: (N, in), y: (N, out)."""
    A, B = factors.to(x.dtype)
    if A.shape[0] == 1 and not torch.is_grad_enabled():  # elementwise, in half the time of a product of inner size one
        return y.addcmul_(x @ A.t(), B.t(), value=factors.scale)
    return y.addmm_(x @ A.t(), B.t(), alpha=factors.scale)


ExpertFactors = tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]
"""A and B of every expert, and the scale."""


class LoRAExperts(_Wrapper):
    """The experts of a transformers 5 MoE layer, kept as 3-D parameters, and the bank's adapters on them.

    Rows without an adapter run the base's own implementation (`experts_implementation`), apart from the others: how
    many tokens an expert gets decides the last bit of a matrix product, and the others' routing is theirs. Rows with an
    adapter run the loop below: what the eager implementation of `transformers` does, in its order, with the deltas
    added before each activation. To the bit, a fresh adapter is the base only under the eager implementation.
    """

    def __init__(self, base: nn.Module, name: str, current: CurrentRouting):
        super().__init__(base, name, current)
        self.up_name = "gate_up_proj" if hasattr(base, "gate_up_proj") else "up_proj"
        self.n_experts = len(base.down_proj)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (N, d); top_k_index, top_k_weights: (N, K). Returns (N, d)."""
        routing = self.current.routing
        if routing is None:
            return self.base(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        adapters = [assignment.adapter for assignment in routing.assignments]
        adapter_of = torch.full((len(hidden_states),), -1, device=hidden_states.device)  # (N,)
        for i, assignment in enumerate(routing.assignments):
            adapter_of[routing.tokens(assignment.where, len(hidden_states))] = i
        bare = torch.where(adapter_of < 0)[0]
        if len(bare):
            result.index_copy_(0, bare, self.base(hidden_states[bare], top_k_index[bare], top_k_weights[bare]))
        factors = {  # cast and taken apart once: each of E slices would have a gradient of the whole tensor's size
            leaf: [self._factors(adapter, leaf, hidden_states.dtype) for adapter in adapters]
            for leaf in (self.up_name, "down_proj")
        }
        chosen = top_k_index.t().masked_fill(adapter_of < 0, -1)  # (K, N)
        expert: int
        for expert in chosen.unique().tolist():
            if not 0 <= expert < self.n_experts:
                continue  # rows without an adapter, or a sentinel of expert parallelism
            slot, token = torch.where(chosen == expert)
            x, mine = hidden_states[token], adapter_of[token]
            h = self._linear(x, self.up_name, expert, factors[self.up_name], mine)
            h = self._activate(h)
            h = self._linear(h, "down_proj", expert, factors["down_proj"], mine)
            if getattr(self.base, "has_post_expert_norm", False):
                h = self.base.post_expert_norm(h)  # type: ignore[operator]
            h = h * top_k_weights[token, slot, None]
            result.index_add_(0, token, h.to(result.dtype))
        return result

    def _factors(self, adapter: Adapter, leaf: str, dtype: torch.dtype) -> ExpertFactors | None:
        factors = adapter.factors.get(f"{self.name}.{leaf}")
        if factors is None:
            return None
        A, B = factors.to(dtype)
        return A.unbind(), B.unbind(), factors.scale

    def _linear(
        self, x: Tensor, leaf: str, expert: int, factors: Sequence[ExpertFactors | None], mine: Tensor
    ) -> Tensor:
        weight, bias = getattr(self.base, leaf)[expert], getattr(self.base, f"{leaf}_bias", None)
        if getattr(self.base, "is_transposed", False):
            y = x @ weight if bias is None else x @ weight + bias[expert]  # one addmm would round otherwise
        else:
            y = nn.functional.linear(x, weight, None if bias is None else bias[expert])
        for i, of_adapter in enumerate(factors):
            if of_adapter is None:
                continue
            A, B, scale = of_adapter[0][expert], of_adapter[1][expert], of_adapter[2]
            if len(factors) == 1:
                y.addmm_(x @ A.t(), B.t(), alpha=scale)
            else:
                rows = torch.where(mine == i)[0]
                y.index_add_(0, rows, x[rows] @ A.t() @ B.t(), alpha=scale)
        return y

    def _activate(self, h: Tensor) -> Tensor:
        base = self.base
        if not getattr(base, "has_gate", True):
            return base.act_fn(h)  # type: ignore[operator]
        if hasattr(base, "_apply_gate"):
            return base._apply_gate(h)  # type: ignore[operator]
        gate, up = h.chunk(2, dim=-1)
        return base.act_fn(gate) * up  # type: ignore[operator]
