"""What an `adapter_config.json` of PEFT says: every field checked before it is used, and patterns of module names.

The file may come from anybody: what it holds is refused by name, and never hangs, crashes or fills the memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any

MAX_BYTES = 16 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1e6
MAX_PATTERNS, MAX_PATTERN = 10_000, 1000
"""Entries of `rank_pattern`, and characters of one."""
CPU_SECONDS = 2
"""For matching all patterns that are more than names; ordinary ones take a hundredth of it."""

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's other `init_lora_weights` (pissa, olora, corda, loftq, ...) also change the base's weights."""
FIELDS: dict[str, str] = {
    **dict.fromkeys(["base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"], "a text"),
    **dict.fromkeys(["ensure_weight_tying", "fan_in_fan_out", "inference_mode", "use_rslora"], "true or false"),
    **dict.fromkeys(["exclude_modules", "layers_pattern", "target_modules"], "a text or a list of texts"),
    "target_parameters": "a list of texts",
    "layers_to_transform": "a whole number or a list of them",
    **dict.fromkeys(["alpha_pattern", "rank_pattern"], "a mapping of names to numbers"),
    "lora_dropout": "a number from 0 to 1",
    "init_lora_weights": "true, false or a text",
    "qalora_group_size": "a number",
    **dict.fromkeys(["auto_mapping", "corda_config", "eva_config", "loftq_config", "lora_ga_config"], "anything"),
    **dict.fromkeys(["megatron_core", "runtime_config", "r", "lora_alpha"], "anything"),
}
"""Fields that are read here, or change nothing, and what they hold where they are not null. What changes nothing steers
initialization, training, or which layers PEFT picks. Rank and alpha have checks of their own."""

_repr = Repr()
_repr.maxstring = _repr.maxother = 80


def excerpt(value: object) -> str:
    """A value of a file in a message: a short text as it is, all else as Python writes it, cut; no control codes."""
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else _repr.repr(value)


def read_config(file: Path) -> dict[str, Any]:
    """The configuration in `adapter_config.json`, checked.

    Raises:
        ValueError: no JSON, another kind of adapter, or a field that cannot be meant; names file and field.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than any adapter's configuration")
        text = file.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    except (ValueError, RecursionError, OSError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not valid JSON: {why}") from error
    _check(config, file)
    return config


def resolve_patterns(
    patterns: Mapping[str, Any] | None, names: Sequence[str], default: Any, file: Path, field: str
) -> list[Any]:
    """The value of each name by PEFT's rule: of the first pattern that matches the name or a dotted end of it.

    Patterns are regular expressions. All that are not plain names are matched in a process of their own, whose time is
    limited: some take years, and nothing in this process could stop them.

    Raises:
        ValueError: a pattern is no regular expression, or matching takes too long.
    """
    if not patterns:
        return [default] * len(names)
    keys, values = list(patterns), list(patterns.values())
    if all(re.fullmatch(r"[\w.-]+", key) for key in keys):
        found = [next((i for i, key in enumerate(keys) if _is_end(key, name)), None) for name in names]
    else:
        found = _match(keys, names, f"{file}: {field}")
    return [default if i is None else values[i] for i in found]


def _is_end(pattern: str, name: str) -> bool:
    """Whether a name, in which a dot stands for any character, as in a regular expression, is a dotted end."""
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(pattern, name[start:], strict=True))


_MATCHER = r"""
import json, re, sys, warnings
warnings.simplefilter("ignore")
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except ImportError:
    pass
patterns, names = json.load(sys.stdin)
compiled = []
for pattern in patterns:
    try:
        compiled.append(re.compile(rf"(.*\.)?({pattern})$"))
    except Exception as error:
        print(json.dumps([pattern, str(error) or type(error).__name__]))
        sys.exit()
found = [next((i for i, c in enumerate(compiled) if c.match(name)), None) for name in names]
print(json.dumps(found if found else []))
""".replace("SECONDS", str(CPU_SECONDS))


def _match(patterns: Sequence[str], names: Sequence[str], where: str) -> list[int | None]:
    """Which pattern is the first to match each name."""
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    given = json.dumps([patterns, names])
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=30 * CPU_SECONDS, check=True
        )
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"{where}: matching its patterns takes too long; name the modules instead") from error
    if found and isinstance(found[0], str):
        raise ValueError(f"{where}: {excerpt(found[0])} is not a regular expression: {excerpt(found[1])}")
    return found


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {excerpt(key)} twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check(config: Any, file: Path) -> None:
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {_repr.repr(kind)}; only LORA adapters are supported")
    for field, value in config.items():
        what = f"{file}: {excerpt(field)}"
        if field not in FIELDS:
            if value and value != "none":
                said = f"{what}={_repr.repr(value)} is not supported"
                raise ValueError(f"{said}; train the adapter as plain LoRA, without it")
        elif value is not None and not _is(FIELDS[field], value):
            raise ValueError(f"{what} must be {FIELDS[field]}, got {_repr.repr(value)}")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        said = f"init_lora_weights={_repr.repr(init)} changes the base"
        raise ValueError(f"{file}: {said}; convert it to plain LoRA with peft")
    for field, of_pattern, largest, whole in (
        ("r", "rank_pattern", MAX_RANK, True),
        ("lora_alpha", "alpha_pattern", MAX_ALPHA, False),
    ):
        entries = config.get(of_pattern) or {}
        if len(entries) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN for pattern in entries):
            most = f"at most {MAX_PATTERNS:,} patterns of at most {MAX_PATTERN:,} characters"
            raise ValueError(f"{file}: {of_pattern} may hold {most}")
        _check_number(config.get(field), f"{file}: {field}", largest, whole)
        for pattern, value in entries.items():
            _check_number(value, f"{file}: {of_pattern}: {excerpt(pattern)}", largest, whole)


def _is(kind: str, value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or isinstance(value, float)
    return {
        "anything": True,
        "a text": isinstance(value, str),
        "true or false": isinstance(value, bool),
        "a text or a list of texts": isinstance(value, str) or texts,
        "a list of texts": texts,
        "a whole number or a list of them": whole
        or (isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)),
        "a mapping of names to numbers": isinstance(value, dict),
        "a number": number,
        "a number from 0 to 1": number and 0 <= value <= 1,
        "true, false or a text": isinstance(value, bool | str),
    }[kind]


def _check_number(value: Any, what: str, largest: float, whole: bool) -> None:
    wrong = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        wrong = "must be a number > 0"
    elif value > largest:
        wrong = f"must be at most {largest:,.0f}"
    elif whole and not isinstance(value, int):
        wrong = "must be a whole number"
    if wrong:
        raise ValueError(f"{what} {wrong}, got {_repr.repr(value)}")
