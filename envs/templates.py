"""Questions made of templates: names in braces that stand for values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> set[str]:
    """The names between single braces in `template`. Raises ValueError if `template` is not a text."""
    if not isinstance(template, str):
        raise ValueError(f"template must be a text, got {template!r}")
    return set(_PLACEHOLDER.findall(template))


def check_placeholders(what: str, template: str, names: Collection[str]) -> None:
    """Raise ValueError for a name in braces that is nearly one of these: it would stand in the text as it is. Other
    braces are meant, such as those of LaTeX."""
    for placeholder in sorted(placeholders(template) - set(names)):
        if near := difflib.get_close_matches(placeholder, sorted(names), 1, cutoff=0.75):
            raise ValueError(
                f"{what} names {{{placeholder}}}: did you mean {{{near[0]}}}? There are {', '.join(names)}"
            )


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with {name} replaced for each name in `values`; all other braces, in values too, stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
