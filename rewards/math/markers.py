r"""Answers that are marked as such by a sign: \boxed{...} and "#### "."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from rl_lora.rewards.math.numbers import DECIMAL


def last_match(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    """The last of some matches, or None."""
    return next(iter(collections.deque(matches, maxlen=1)), None)


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` holds; of `\boxed 5` the token behind it. A box inside the last
    box gives the inner one. A box that is never closed (a truncated completion) is empty, not a shorter answer. Boxes
    joined to it are one list: "\boxed{1} and \boxed{-2}" has two."""
    held = boxes(text)
    return None if held is None else ", ".join(held)


def boxes(text: str) -> list[str] | None:
    """What the last box and the boxes joined to it hold, each."""
    last = last_match(_BOX.finditer(text))
    if last is None:
        return None
    rest = text[last.end() :]
    if not rest.startswith("{"):
        token = re.match(rf"[-+\u2212]?(?:{DECIMAL}|\\[a-zA-Z]+(?:\{{[^{{}}]*\}})*|[a-zA-Z])", rest)
        return [token[0] if token else ""]
    end = _closing_brace(rest)
    held, before = [rest[1:end]] if end else [""], text[: last.start()]
    for _ in range(8 if end else 0):
        previous = last_match(_BOX.finditer(before))
        if previous is None:
            break
        rest = before[previous.end() :]
        end = _closing_brace(rest)
        if not end or not _BETWEEN_BOXES.fullmatch(rest[end + 1 :]):
            break
        if rest[1:end].strip() not in held:
            held.insert(0, rest[1:end].strip())
        before = before[: previous.start()]
    return held


_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|\\[()]|\\q?quad)*(?:,|;|/|\band\b|,?\s*\bor\b(?:\s+(?:[a-z]+\b,?\s*){1,4}(?=[$\\]|\Z))?|\\text\s*\{\s*,?\s*(?:and|or)\s*\})"
    r"(?:\s|\$|\\[()]|\\q?quad|\band\b|\bor\b|\\?[a-zA-Z]+(?:_\{?\w+\}?|'|\([a-z]\))*\s*=)*"
)


def _closing_brace(text: str) -> int:
    """Index of the brace that closes the one at 0; 0 if there is none."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.start()
    return 0


_FORMULA = re.compile(r"[-+\N{MINUS SIGN}*$({\[|]*(?:(?:[a-zA-Z][^:]*[-+*/^_=<>()0-9].*)|[A-J]|[a-zA-Z]\W*)")
_FUNCTION = re.compile(r"\\[a-zA-Z]+|\b(?:sqrt|pi|sin|cos|tan|log|ln|exp|and|or)\b")


def hashes(text: str) -> str | None:
    """What stands behind the last "####" on its line, as in GSM8K. A markdown heading ("#### Step 2", "#### 1. Add")
    is not an answer: a number, a formula ("y^2 - 5y") or nothing must follow."""
    for line in reversed(re.findall(r"####(?!#)[ \t]*([^\n]*)", text)):
        if not line.strip():
            return ""
        if re.match(r"[-+\N{MINUS SIGN}*($£€{\[.\s]*[0-9\\]", line) and not re.match(r"[0-9]+[.)]\s+\S", line):
            return str(line)
        if _FORMULA.fullmatch(line) and not re.search(r"[^\W\d_]{2}", _FUNCTION.sub(" ", line)):
            return str(line)
    return None
