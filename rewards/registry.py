"""From what a configuration says of a reward to the function that it means."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl_lora.rewards.format import format_match
from rl_lora.rewards.judging import Part, WeightedSum
from rl_lora.rewards.length import length_reward
from rl_lora.rewards.math.verdict import math_match
from rl_lora.rewards.numeric import numeric_match
from rl_lora.rewards.score import RewardFunction, name_of
from rl_lora.rewards.signature import read
from rl_lora.system.user_object import user_object

BUILTINS: dict[str, RewardFunction] = {
    "format": format_match,
    "length": length_reward,
    "math": math_match,
    "numeric": numeric_match,
}

RewardSpec = str | Mapping[str, Any] | Sequence[Any] | RewardFunction


def resolve(spec: RewardSpec) -> RewardFunction:
    """The reward function that `spec` means.

    - a built-in: `math`, `numeric`, `format`, `length`;
    - `module:function`, a function of your own. The module is looked for on Python's path, then in the working
      directory;
    - a mapping from such names to weights, for a weighted sum that reports its parts (weight 0: only reports). In
      place of a weight, a mapping gives options too, which are the keyword parameters of the function:

          reward:
            numeric: 1.0
            format: {weight: 0.1, pattern: '-?\\d+'}
            my_rewards:politeness: 0        # a metric

      In Python a name may be any text, with a function as its value, or as the option `function`;
    - a list of names and functions: their sum, of weight 1 each;
    - a function, as it is: `rl_lora.rewards.signature` says what it may take.

    Raises:
        ValueError: a name, option or weight that cannot be; the message says what there is.
    """
    if isinstance(spec, str):
        return _named(spec, {})
    if isinstance(spec, Mapping):
        if not spec:
            raise ValueError("a reward needs at least one part, got an empty mapping")
        return WeightedSum(tuple(_part(name, setting) for name, setting in spec.items()))
    if isinstance(spec, list | tuple) and spec:
        return WeightedSum(tuple(_part(*item) for item in _numbered(spec)))
    if callable(spec):
        return _with_options(name_of(spec), spec, {})
    raise ValueError(f"a reward must be a name, 'module:function', a mapping, a list or a function, got {spec!r}")


def _numbered(spec: Sequence[Any]) -> list[tuple[str, Any]]:
    """The parts of a list under names of their own: those of two equal ones get a number."""
    names = [one if isinstance(one, str) else name_of(one).rpartition(".")[2] for one in spec]
    unique = [
        name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}" for i, name in enumerate(names)
    ]
    return [(name, resolve(one)) for name, one in zip(unique, spec, strict=True)]


def _part(name: str, setting: Any) -> Part:
    if callable(setting):
        setting = {"function": setting}
    options = dict(setting) if isinstance(setting, Mapping) else {"weight": setting}
    weight, function = options.pop("weight", 1.0), options.pop("function", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")
    if function is None:
        return Part(name, _named(name, options), float(weight))
    return Part(name, _with_options(name, resolve(function), options), float(weight))


def _named(name: str, options: dict[str, Any]) -> RewardFunction:
    if name in BUILTINS:
        function = _with_options(name, BUILTINS[name], options)
        try:  # built-ins are pure and check their options when called: better now than in the middle of a run
            function("", 0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name!r} with {options}: {error}") from error
        return function
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"no reward is called {name!r}; there are {', '.join(BUILTINS)} and 'module:function'")
    return _with_options(name, user_object(name, "reward"), options)


def _with_options(name: str, function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """The function with its options bound. Raises ValueError unless it takes them."""
    if isinstance(function, WeightedSum):
        if options:
            raise ValueError(f"reward {name!r} is a sum, and takes no options, got {options}")
        return function
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some C functions have none
        parameters = {}
    kinds = [parameter.kind for parameter in parameters.values()]
    if parameters and inspect.Parameter.VAR_KEYWORD not in kinds and (wrong := options.keys() - parameters.keys()):
        raise ValueError(
            f"reward {name!r} does not take {', '.join(map(repr, sorted(wrong)))}; its parameters are "
            f"{inspect.signature(function)}"
        )
    function = functools.partial(function, **options) if options else function
    read(function, name, None)
    return function
