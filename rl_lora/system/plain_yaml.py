"""YAML of configs, as it is read and written: without what surprises in YAML 1.1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

BOOL, INT, FLOAT, NULL, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null", "merge"))


class Loader(yaml.SafeLoader):
    """Dates, numbers of base 60 or 8 and `=` are texts, 1e-3 is a number, and no name comes twice in a mapping."""


class Dumper(yaml.SafeDumper):
    """Puts texts in quotes that YAML, or `Loader`, would take for something else."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in (BOOL, NULL, MERGE)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern in (
    (INT, r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+"),
    (FLOAT, r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
):
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list("-+.0123456789"))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    return int(digits, {"0x": 16, "0b": 2}.get(digits[:2], 10))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return {loader.construct_object(key, deep=True): loader.construct_object(v, deep=True) for key, v in items(node)}


Loader.add_constructor(INT, _int)
Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def items(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys and values. Raises ValueError for a key that comes twice: one of its values would be lost."""
    merged = any(key.tag == MERGE for key, _ in node.value)
    if merged:
        Loader("").flatten_mapping(node)  # what is merged comes first, and may be overridden
    seen: set[Any] = set()
    for key, value in node.value:
        if not merged and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value)
        yield key, value


def dump(value: Any) -> str:
    """A config of plain data as a YAML file holds it, in ASCII."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)
