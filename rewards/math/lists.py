r"""Texts taken apart at the places that matter: outside of brackets, at commas, rows, and words of condition.

Reads only: nothing here says what is equal. Lists, sets, tuples, matrices, a value under a condition, the two of a \pm.
"""

from __future__ import annotations

import functools
import re

from rl_lora.rewards.math.cleaning import clean
from rl_lora.rewards.math.numbers import quantity
from rl_lora.rewards.math.text import canonical
from rl_lora.rewards.math.units import split_unit

MAX_ITEMS = 64
"""Lists and matrices with more entries than this are not taken apart."""
_CONDITION_WORD = r"(?:for|if|when(?:ever)?|where|provided(?:\s+that)?|with)"
_CONDITION = (
    rf"\\(?:text|mbox|textrm|mathrm)\s*\{{[\s,]*{_CONDITION_WORD}(?:\s+(?:all|any|every|some))?\s*\}}"
    rf"|(?<![a-zA-Z\\{{]){_CONDITION_WORD}(?:\s+(?:all|any|every|some))?(?![a-zA-Z])"
)
WORDED = re.compile(r"\\(?:text|mbox|mathrm)|(?<![a-zA-Z\\])[a-z]{2}")
_REMARK = re.compile(r"(.*\S)\s*\\(?:text|mbox|textrm|textit)\s*\{([^{}]*[a-zA-Z]{2}[^{}]*)\}", re.DOTALL)
_KIND_NAMES = """
    odd even prime composite rational irrational real complex imaginary integer integers whole natural positive negative
    nonnegative nonzero divisible multiple constant finite infinite convergent divergent
"""
_KINDS = frozenset(_KIND_NAMES.split())
_PLAIN_REMARK = re.compile(rf"(.*\S)\s+((?:is|are)\s+[a-z -]+|(?:not\s+)?(?:{'|'.join(_KINDS)})(?:\s[a-z ]+)?)")


def with_condition(text: str) -> tuple[str, str] | None:
    parts = top_level(text, _CONDITION)
    if len(parts) == 2 and all(parts) and not any(is_bare_list(part.strip(" ,;")) for part in parts):
        return parts[0].rstrip(" ,;"), parts[1]
    match = _REMARK.fullmatch(text) or _PLAIN_REMARK.fullmatch(text)
    if match is None or is_bare_list(text):
        return None
    words = match[2].strip(" ,.()").lower()
    if not words.startswith(("is ", "are ")) and not (
        re.search("[a-zA-Z]", match[1]) and (_KINDS & set(words.split()) or split_unit(text)[1] is None)
    ):
        return None
    return match[1], re.sub(r"^(?:is|are)\s+", "", words)


def top_level(text: str, separator: str) -> list[str]:
    """The text split where the regular expression `separator` matches outside of brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        rf"\\begin\{{|\\end\{{|(?P<cut>{separator})|\\[{{]|\\[}}]|[(\[{{]|[)\]}}]|\\[a-zA-Z]+", text
    ):
        token = match[0]
        if match["cut"] is not None and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif token == r"\begin{":
            depth += 2
        elif token == r"\end{":
            depth += 0
    return [part.strip() for part in [*parts, text[start:]]]


def spread_signs(text: str) -> str:
    inner, braces = _braced(text)
    items = []
    for item in top_level(inner, ","):
        if re.search(r"\\[pm]m(?![a-zA-Z])", item):
            left, equals, right = item.rpartition("=")
            for plus, minus in (("+", "-"), ("-", "+")):
                signs = re.sub(r"\\mp(?![a-zA-Z])", minus, re.sub(r"\\pm(?![a-zA-Z])", plus, right))
                items.append(left + equals + signs)
        else:
            items.append(item)
    joined = ", ".join(items)
    return rf"\{{{joined}\}}" if braces else joined


def _braced(text: str) -> tuple[str, bool]:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return text[2:-2].strip(), True
    return text, False


_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_FACTOR = re.compile(r"([^=<>]*?[^=<>\s+-])\s*(?:\\cdot|\\times|\*)?\s*(?=\\begin\{([pbBvV]?matrix|array)\})")


def rows_of(text: str) -> list[list[str]] | None:
    """The entries of a matrix; brackets around a bare one change nothing. A determinant (vmatrix) is none."""
    text = re.sub(r"^[(\[]\s*(?=\\begin)|(?<=\})\s*[)\]]$", "", text)
    factor = _FACTOR.match(text)
    factor = None if factor and r"\begin" in factor[1] else factor
    match = _MATRIX.fullmatch(text[factor.end() :] if factor else text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match[2]) if row.strip()]
    cells = [[clean(cell) for cell in row.replace(r"\hline", "").split("&")] for row in rows]
    return [[f"({factor[1]})({cell})" for cell in row] for row in cells] if factor else cells


def distinct(items: list[str]) -> list[str]:
    """A set without what is in it twice."""
    if len(items) > MAX_ITEMS or len({canonical(item) for item in items}) == len(items) > 8:
        return items
    found: list[str] = []
    for item in items:
        if not any(canonical(item) == canonical(other) for other in found):
            found.append(item)
    return found


def by_name(items: list[str]) -> list[str]:
    """y = 9, x = 4 in the order of the names, which is that of a tuple."""
    names = [re.match(r"\s*([a-zA-Z](?:_\{?[0-9]+\}?)?)\s*=", item) for item in items]
    found = [match[1] for match in names if match]
    if len(found) < len(items) or len(set(found)) < len(items):
        return items
    return [item for _, item in sorted(zip(found, items, strict=True))]


@functools.lru_cache(maxsize=64)  # asked for by every kind of part
def items_of(text: str) -> tuple[str, list[str]]:
    inner, braces = _braced(text)
    kind = r"\{" if braces else ""
    if text.startswith("{") and text.endswith("}") and "," in text and text.count("{") == 1:
        inner = text[1:-1]
    if match := re.fullmatch(r"\\langle(?![a-zA-Z])(.*)\\rangle", text, re.DOTALL):
        inner, kind = match[1], r"\langle"
    elif (
        text[:1] in ("(", "[")
        and text[-1:] in (")", "]")
        and len(top_level(text[1:-1], "[,;]")) > 1
        and _encloses(text)
    ):
        inner, kind = text[1:-1], text[0] + text[-1]
    words = r",?\s*(?:\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*"
    separator = rf"{words}|,|;" if kind in ("", r"\{") else ";" if len(top_level(inner, ";")) > 1 else ","
    if kind == "" and "," in text and quantity(text) is not None:
        return "", [text]
    items = [clean(item) for item in top_level(inner, separator)]
    if kind == "" and all(re.fullmatch(r"[0-9]{3}", item) for item in items[1:]) and re.search(r"[0-9],[0-9]", text):
        return "", [text] if len(items) > 1 and re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+", text) else items
    return kind, items


def is_bare_list(text: str) -> bool:
    kind, items = items_of(text)
    return kind == "" and len(items) > 1


def _encloses(text: str) -> bool:
    """Whether the first bracket closes at the very end: (1,2) does, (a+b)(c,d) does not."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return index == len(text) - 1
    return False


_SYSTEM = re.compile(r"\\begin\{(cases|aligned|align\*?|gathered)\}(.*)\\end\{\1\}", re.DOTALL)


def as_list(text: str) -> str:
    """A system of equations as a list; the real numbers as an interval."""
    if match := _SYSTEM.fullmatch(text):
        return ", ".join(row.strip(" ,") for row in match[2].replace("&", "").split(r"\\") if row.strip(" ,"))
    return r"(-\infty,\infty)" if canonical(text) in (r"\mathbb{R}", r"\mathbbR", r"\R", r"\Reals") else text
