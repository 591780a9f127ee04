r"""Line breaks and wide spaces: several equations in one answer become a list, any other break is a space.

"a = 4 \quad b = 3", and the same on two lines or with \\ between, says what "a = 4, b = 3" says.
"""

from __future__ import annotations

import re

_NAME = r"\\?[a-zA-Z]+(?:_(?:\{[^{}]*\}|\w))?'?"
_RELATION = r"=|<|>|≤|≥|≠|≈|∈|\\(?:leq?(?:slant)?|geq?(?:slant)?|neq?|in|approx|lt|gt)(?![a-zA-Z])"
_OPENING = re.compile(r"^(?:\s|\$|&|\\[\[(])+")
_CLOSING = re.compile(r"(?:\s|\$|[,;&]|\\[\])])+$")
_EQUATION = re.compile(rf"({_NAME})(?:\s*\([\w, ]*\))?\s*(?:{_RELATION})")
_GAP = re.compile(  # taken whole or not at all: a run of spaces is read once from each place in it
    r"(?>(?:\s|[,;$&]|\\[)(]|\\q?quad(?![a-zA-Z])|\\text\s*\{\s*and\s*\}|\\\\(?=\s|[a-zA-Z]\s*=))+)"
    rf"(?={_EQUATION.pattern})"
)
_WIDE = re.compile(r"\n|quad|\\\\")
_BESIDE = re.compile(rf"(?<=[\w}})])\s+(?={_NAME}\s*=)")


def equations_as_list(text: str) -> str:
    """Equations for different names, each on its line or behind a wide space, with commas between them."""
    if ("\n" not in text and "quad" not in text and "\\\\" not in text) or r"\begin" in text or len(text) > 1000:
        return text
    return _listed([_CLOSING.sub("", _OPENING.sub("", part)) for part in _split(text)]) or text


def side_by_side(text: str) -> str:
    """The same of "a = 4 b = 3", which could be a product in a chain: only for a text beside one with two equations."""
    return _listed(_BESIDE.split(text)) or text


def _split(text: str) -> list[str]:
    parts, start = [], 0
    for match in _GAP.finditer(text):
        if _WIDE.search(match[0]):
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _listed(parts: list[str]) -> str | None:
    names = [match[1] if (match := _EQUATION.match(part)) else "" for part in parts]
    return ", ".join(parts) if len(parts) > 1 and all(names) and len(set(names)) == len(names) else None
