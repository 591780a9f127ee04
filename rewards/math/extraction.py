r"""Where in a completion the answer stands. Text in, text out: nothing is parsed as mathematics here.

The work is linear in the length of the text, which is capped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_lora.rewards.math.characters import ascii_text
from rl_lora.rewards.math.markers import boxed, boxes, hashes, last_match
from rl_lora.rewards.math.phrases import phrase
from rl_lora.rewards.math.prose import in_json, told, without_html
from rl_lora.rewards.math.spans import last_expression, last_number, whole

MAX_CHARS = 20_000
"""Only this many characters at the end of a completion are looked at: an answer stands at the end."""


@dataclass(frozen=True)
class Found:
    """What one method found: the text of the answer, "" if the place for it is there but empty."""

    text: str
    method: str
    boxes: tuple[str, ...] = ()
    """What each of several joined boxes holds."""


def extract(text: str, methods: Sequence[str]) -> Found | None:
    """The answer by the first method that finds its place, or None. An empty place (`\\boxed{}`) ends the search:
    a completion that declares an answer is not searched for a better one. What stands before </think> is not looked
    at."""
    text = _SPECIAL_TOKENS.sub("", text[-MAX_CHARS:].rpartition("</think>")[2])
    text = without_html(text if text.isascii() else ascii_text(text))
    for method in methods:
        found = METHODS[method](text)
        if found is not None:
            held = tuple(boxes(text) or ()) if method == "boxed" and ", " in found else ()
            return Found(_value(found) if method in STRICT else found.strip(), method, held if len(held) > 1 else ())
    return None


def _value(marked: str) -> str:
    """A marked answer without the words around it: "The answer is 28", "Area: 54"."""
    if marked.isascii() and not re.search(r"[a-zA-Z]{2}", marked):
        return marked.strip()
    spoken = phrase(marked.replace(r"\text{", " ").replace("}", " ")) if re.search(r"\bis\b", marked) else None
    return (spoken or told(marked)).strip()


_SPECIAL_TOKENS = re.compile(r"(?:<\|[a-zA-Z_]{1,30}\|>|</s>|<eos>)\s*\Z")


def tagged(text: str) -> str | None:
    """What the last <answer>...</answer> holds (any case), or the "answer" of a JSON object at the end; one that is
    never closed runs to the end of the text, as a stop string often takes the closing tag. A box, a line of #### or
    "the answer is" inside it is looked into."""
    start = last_match(re.finditer(r"<answer>", text, re.IGNORECASE))
    if start is None:
        return in_json(text)
    inside = re.split(r"</answer>", text[start.end() :], maxsplit=1, flags=re.IGNORECASE)[0]
    for method in (boxed, hashes, phrase):
        found = method(inside)
        if found is not None:
            return found
    return inside


METHODS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "hash": hashes,
    "tag": tagged,
    "phrase": phrase,
    "whole": whole,
    "last_number": last_number,
    "last_expression": last_expression,
}
STRICT = ("boxed", "hash", "tag")
FLEXIBLE = (*STRICT, "phrase", "whole", "last_expression")


def methods_of(extraction: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that "strict", "flexible" or a sequence of their names mean; ValueError for any other."""
    if extraction in ("strict", "flexible"):
        return STRICT if extraction == "strict" else FLEXIBLE
    methods = (extraction,) if isinstance(extraction, str) else tuple(extraction)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"extract must be 'strict', 'flexible' or names out of {', '.join(METHODS)}, got {extraction!r}"
        )
    return methods
