"""A model's norms, rotary embeddings and gated MLPs by the kernels of `elementwise.py`, on a CPU.

Modules are known by their structure, whatever they are called, and each kind is proven: the kernel has to give what the
module gives on random numbers. What computes something else stays as it is, and so does every call that the kernels do
not serve: of another dtype or device, or where the norm's weight is trained.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from rl_lora.kernels import elementwise
from rl_lora.kernels.elementwise import Activation

EPSILONS = ("variance_epsilon", "eps", "epsilon")
ROTARY = "apply_rotary_pos_emb"
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
TOLERANCE = 1e-5
"""Largest difference of float32 from float64, of numbers of about one."""


class Norm(NamedTuple):
    """What is to know of an RMSNorm; see `elementwise.rms_norm`."""

    epsilon: str
    """The attribute that holds it."""
    offset: float
    rounds: bool


def fuse(model: nn.Module) -> None:
    """Let the norms and gated MLPs of a model run by the kernels, as far as these compute the same."""
    if any(x.device.type != "cpu" for x in model.parameters()) or elementwise.library() is None:
        return
    proven: dict[Any, Callable[..., Any] | None] = {}
    for module in model.modules():
        find = _gated_mlp_of if set(module._modules) == MLP else _norm_of if _is_norm(module) else None
        if find is None or "forward" in module.__dict__:  # another library has put its own there, or this one before
            continue
        kind = _kind(module)
        if kind not in proven:
            proven[kind] = _quietly(find, module)
        if (forward := proven[kind]) is not None:
            module.forward = partial(forward, module)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    alone = not module._modules and not module._buffers and len(module._parameters) == 1
    return alone and weight is not None and weight.dim() == 1  # None: nn.RMSNorm(elementwise_affine=False)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind compute the same but for their weights."""
    simple = {name: x for name, x in vars(module).items() if isinstance(x, int | float | str | None)}
    act = getattr(module, "act_fn", None)
    return type(module), tuple(sorted(simple.items(), key=str)), type(act), str(act)


def _quietly(find: Callable[[Any], Any], candidate: Any) -> Any:
    """What is found; None where the comparison raises, as where other arguments are wanted."""
    try:
        # Hooks that count or drop what a pass keeps are not meant for this comparison.
        with torch.no_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            return find(candidate)
    except Exception:
        return None


def _with(module: nn.Module, **parts: Any) -> nn.Module:
    """A copy that holds other parameters or children, and shares all else."""
    other = copy.copy(module)
    other.__dict__.update({name: {**module.__dict__[name], **given} for name, given in parts.items()})
    return other


def _norm_of(module: nn.Module) -> Callable[..., Any] | None:
    """A forward for a module that is an RMSNorm."""
    epsilon = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if epsilon is None:
        return None
    g = torch.Generator().manual_seed(0)
    d = module.get_parameter("weight").shape[0]
    # Small numbers, so that it matters where epsilon is added.
    x, weight = 3e-3 * torch.randn(2, 3, d, generator=g), torch.rand(d, generator=g) + 0.5

    def results(dtype: torch.dtype) -> Tensor:
        return _with(module, _parameters={"weight": nn.Parameter(weight.to(dtype))}).forward(x.to(dtype))

    eps, in_float32, in_bfloat16 = getattr(module, epsilon), results(torch.float32), results(torch.bfloat16)
    for offset in (0.0, 1.0):
        exact = elementwise.plain_rms_norm(x.double(), weight.double(), eps, offset)
        if not _is_close(in_float32, exact):
            continue
        wide, narrow = (x.bfloat16(), weight.bfloat16()), []
        for rounds in (True, False):
            ours = elementwise.rms_norm(*wide, eps, offset, rounds)
            narrow.append(int((ours != in_bfloat16).sum()))
        # Which of both it is shows in every third number; few differ by the order of a sum.
        if in_bfloat16.dtype == torch.bfloat16 and min(narrow) <= 0.01 * x.numel() + 1:
            return partial(_rms_norm, Norm(epsilon, offset, narrow[0] <= narrow[1]))
    return None


def _rms_norm(norm: Norm, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of an RMSNorm's forward."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if len(args) == 1 and not kwargs and not (weight.requires_grad and torch.is_grad_enabled()):
        x = args[0]
        # One that multiplies in the dtype of x returns another dtype where its weight has another.
        fits = weight.dtype == x.dtype or (not norm.rounds and weight.dtype in elementwise.DTYPES)
        if fits and x.shape[-1:] == weight.shape and weight.device == x.device and _serves(x):
            return elementwise.rms_norm(x, weight, getattr(module, norm.epsilon), norm.offset, norm.rounds)
    return type(module).forward(module, *args, **kwargs)


def _gated_mlp_of(module: nn.Module) -> Callable[..., Any] | None:
    """A forward for a module that is down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    if module._parameters or module._buffers:
        return None
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 3, 8, generator=g), torch.randn(3, 8, 8, generator=g)

    def results(dtype: torch.dtype, forward: Callable[..., Any] | None = None) -> Tensor:
        linears = {}
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
            linears[name] = nn.Linear(8, 8, bias=False, dtype=dtype)
            linears[name].weight.copy_(weight)
        small = _with(module, _modules=linears)
        return (forward or type(module).forward)(small, x.to(dtype))

    exact = results(torch.float64)
    for activation in ACTIVATIONS:
        forward = partial(_gated_mlp, activation)
        if _is_close(results(torch.float32, forward), exact):
            return forward
    return None


def _gated_mlp(activation: Activation, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of a gated MLP's forward. Its linear layers are looked up here: adapters replace them later."""
    if len(args) == 1 and not kwargs and _serves(args[0]):
        gate, up = module.gate_proj(args[0]), module.up_proj(args[0])  # type: ignore[operator]
        if _serves(gate, up) and gate.shape == up.shape:
            h = elementwise.gated(gate, up, activation)
        else:
            h = module.act_fn(gate) * up  # type: ignore[operator]
        return module.down_proj(h)  # type: ignore[operator]
    return type(module).forward(module, *args, **kwargs)


def _serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these. A compiler that traces a layer fuses the chains with what is around them: to it,
    each kernel would be one more call, of 25 us, in a decode step."""
    return not isinstance(tensors[0], FakeTensor) and elementwise.supports(*tensors)


class Rotary(NamedTuple):
    """The function of a modeling file that turns queries and keys, and what takes its place."""

    modeling: str
    original: Callable[..., Any]
    fused: Callable[..., Any]


def rotaries_of(model: nn.Module) -> list[Rotary]:
    """The functions that this model's layers call and that the kernel computes."""
    if any(x.device.type != "cpu" for x in model.parameters()) or elementwise.library() is None:
        return []
    found = []
    for name in {type(module).__module__ for module in model.modules()}:
        original = getattr(sys.modules.get(name), ROTARY, None)
        if original is not None and _quietly(_is_rotary, original):
            found.append(Rotary(name, original, partial(_rotary, original)))
    return found


@contextmanager
def rotating(rotaries: Sequence[Rotary]) -> Iterator[None]:
    """Inside, these modeling files use the kernel."""
    of = [(sys.modules[x.modeling], x) for x in rotaries]
    replaced = [(modeling, x) for modeling, x in of if getattr(modeling, ROTARY) is x.original]  # else it is already
    for modeling, x in replaced:
        setattr(modeling, ROTARY, x.fused)
    try:
        yield
    finally:
        for modeling, x in replaced:
            setattr(modeling, ROTARY, x.original)


def _is_rotary(function: Callable[..., Any]) -> bool:
    names = list(inspect.signature(function).parameters)
    if names[:4] != ["q", "k", "cos", "sin"] or names[4:] not in ([], ["unsqueeze_dim"]):
        return False
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 16, generator=g), torch.randn(2, 1, 5, 16, generator=g)
    cos, sin = torch.randn(2, 2, 5, 16, generator=g)
    expected = function(*(x.double() for x in (query, key, cos, sin)))
    ours = _rotary(function, query, key, cos, sin)
    return len(expected) == 2 and all(_is_close(a, b) for a, b in zip(ours, expected, strict=True))


def _rotary(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """In the place of `apply_rotary_pos_emb`."""
    if not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3:
        (B, _, L, D), fits = q.shape, _serves(q, k, cos, sin) and k.shape[::2] == q.shape[::2]
        # A part of a head may be turned, and the rest not.
        turned = [x.shape[0] in (1, B) and x.shape[1:] == (L, D) for x in (cos, sin)]
        if fits and all(turned) and D % 2 == 0 and k.shape[3] == D and not (cos.requires_grad or sin.requires_grad):
            return elementwise.rotary(q, k, cos, sin)
    return original(q, k, cos, sin, *args, **kwargs)


def _is_close(found: Any, exact: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != exact.shape:
        return False
    return bool((found.double() - exact).abs().max() <= TOLERANCE * (1 + exact.abs().max()))
