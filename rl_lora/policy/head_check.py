"""Whether a model's output head is what `Head` read off its config: a scale or a soft cap that is forgotten would be
learned around without a word, and in bfloat16 it can be smaller than the rounding of a model's logits.

So the head's parts are looked at one by one while the model runs: what goes into its linear layer, what comes out, and
what becomes of known numbers in the place of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora.kernels.verify import Mismatch, require_close
from rl_lora.policy.head import Head

LARGEST = 9.0
"""Of asinh of the known numbers: about 4,000, far above any cap."""
SAMPLED = 4096
"""Tokens of the vocabulary whose logits are computed again in float32."""


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head, ids: Tensor, states: Tensor, tolerance: float) -> None:
    """Raises ValueError if the model's logits of `ids`, int64 (B, L), are not those that `head` makes of `states`, the
    last hidden states (B, L, d) of `ids`, or not for the same reason. `tolerance`: the largest mean difference, in
    standard deviations, that rounding in the model explains."""
    try:
        seen = _observe(model, ids)
        if len(seen) == 4:
            before = _scale_before(seen["into"], seen["states"])
            _check_linear(head, seen["into"], seen["out"])
            behind = Head(head.weight, head.bias, head.scale / before, head.softcap)
            _check_finish(behind, seen["logits"], seen["out"].shape[-1])
            own = behind.scaled(seen["out"][..., : len(head.weight)].float())
        else:  # its parts are not called as modules
            own = model(input_ids=ids, use_cache=False).logits.float()
        require_close("its logits differ from ours", head.logits(states), own, tolerance)
    except Mismatch as error:
        raise ValueError(
            f"the output head of {type(model).__name__} is more than a linear layer, a scale and a soft cap that its "
            f"config names: {error}; it is not supported"
        ) from error


def _ramp(n: int, like: Tensor) -> Tensor:
    """Known numbers, small and large ones, (n,)."""
    return torch.linspace(-LARGEST, LARGEST, n).sinh().to(like)


def _observe(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """`states`: the backbone's; `into` and `out`: of the head's linear layer;
    `logits`: of `_ramp` in place of `out`."""
    seen: dict[str, Tensor] = {}

    def backbone(module: Any, args: Any, output: Any) -> None:
        seen["states"] = output.last_hidden_state

    def linear(module: Any, args: Any, output: Tensor) -> Tensor:
        seen["into"], seen["out"] = args[0], output
        return _ramp(output.shape[-1], output).expand_as(output)

    head: Any = model.get_output_embeddings()
    hooks = [model.base_model.register_forward_hook(backbone), head.register_forward_hook(linear)]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return {**seen, "logits": logits} if seen.keys() == {"states", "into", "out"} else seen


def _scale_before(into: Tensor, states: Tensor) -> float:
    """The number that the hidden states are multiplied by before the linear layer."""
    if into.shape == states.shape:
        scale = float((into.double() * states).sum() / states.double().square().sum())
        eps = max(torch.finfo(x.dtype).eps for x in (into, states))
        if scale and ((into - scale * states).abs() <= 4 * eps * into.abs()).all():
            return scale
    raise Mismatch("what goes into its linear layer is not the hidden states times a number")


def _check_linear(head: Head, into: Tensor, out: Tensor) -> None:
    some = torch.linspace(0, len(head.weight) - 1, min(SAMPLED, len(head.weight)), device=into.device).long()
    bias = None if head.bias is None else head.bias[some].float()
    expected = torch.nn.functional.linear(into.float(), head.weight[some].float(), bias)
    tolerance = max(4 * torch.finfo(out.dtype).eps, 1e-4)
    require_close(
        "its linear layer gives something else than its weights,", expected, out[..., some].float(), tolerance
    )


def _check_finish(behind: Head, logits: Tensor, n: int) -> None:
    """Each number is off by roundings of the model's dtype, their mean by next to nothing."""
    V, eps = len(behind.weight), max(torch.finfo(behind.weight.dtype).eps, 1e-5)
    expected = behind.scaled(_ramp(n, behind.weight)[:V].float())
    if logits.shape[-1] != V:
        raise Mismatch(f"it has logits of {logits.shape[-1]} tokens, its config says {V}")
    known = expected.abs() > 1e-3
    off = logits.flatten(0, -2)[0].float()[known] / expected[known] - 1
    if not (off.abs().max() <= 4 * eps and abs(float(off.mean())) <= eps / 4):
        k = int(off.abs().argmax())
        found, ours = float(logits.flatten(0, -2)[0][known][k]), float(expected[known][k])
        raise Mismatch(f"where we compute a logit of {ours:.4g}, it has {found:.4g}")
