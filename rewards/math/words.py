"""Numbers written in English words -> digits: "thirteen cookies", "negative two", "two and a half", "four point five".

Only what a text begins with is read, and only if no digit or formula stands in it. Left as they are: ordinals, years,
names that begin with a number ("Seven Samurai").
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

_SMALL = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""".split()  # noqa: SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_UNITS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("third", "thirds"), 3),
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths"), 4),
    **dict.fromkeys(("fifth", "fifths"), 5),
    **dict.fromkeys(("sixth", "sixths"), 6),
    **dict.fromkeys(("eighth", "eighths"), 8),
    **dict.fromkeys(("tenth", "tenths"), 10),
}
NUMBER_WORDS = frozenset((*_UNITS, *_SCALES, *_PARTS, "hundred", "negative", "minus", "point", "dozen"))
_ORDINAL = re.compile(
    r"(?:first|third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|[mbtr]+illion)th)s?"
)
_SIGN = re.compile(r"(?:negative|minus)\s+(?=\S)", re.IGNORECASE)
_DOZEN = re.compile(r"(half (?:a )?)?(?(1)|an? )dozen\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z]+")


def digits(text: str) -> str:
    """The text with the number that it begins with in digits; as it is where it begins with none."""
    sign = _SIGN.match(text)
    rest = text[sign.end() :] if sign else text
    minus = "-" if sign else ""
    if sign and re.match(r"[0-9\\$.(]", rest):
        return minus + rest
    if dozen := _DOZEN.match(rest):
        return f"{minus}{6 if dozen[1] else 12}{rest[dozen.end() :]}"
    if not rest[:1].isalpha() or re.search(r"[0-9\\]", rest):
        return text
    found = list(_WORD.finditer(rest.lower()))
    words = [match[0] for match in found]
    for match, following in itertools.pairwise(found):
        if not re.fullmatch(r"[ -]+", rest[match.end() : following.start()]):
            words = words[: found.index(match) + 1]  # a comma, a slash: the number ends before it
            break
    value, n = _fraction(words)
    if n == 0:
        return text
    number = str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    decimals = list(itertools.takewhile(lambda word: _UNITS.get(word, 10) < 10, words[n + 1 :]))
    if words[n : n + 1] == ["point"] and decimals and value.denominator == 1:
        number = f"{number}.{''.join(str(_UNITS[word]) for word in decimals)}"
        n += 1 + len(decimals)
        if words[n : n + 1] and words[n] in _SCALES:
            return f"{minus}{number}{rest[found[n - 1].end() :]}"
    if len(words) > n and (_goes_on(words[n - 1], words[n]) or re.match(r"[A-Z][a-z]", rest[found[n].start() :])):
        return text  # what has been read is the beginning of another number, or of a name
    return f"{minus}{number}{rest[found[n - 1].end() :]}"


def _goes_on(last: str, word: str) -> bool:
    """Whether a word behind a number, whose last word is `last`, makes another number of it."""
    return (
        word in NUMBER_WORDS
        or word in ("score", "dozens")
        or _ORDINAL.fullmatch(word) is not None
        or (word == "second" and last in _TENS)
    )


def _fraction(words: list[str]) -> tuple[Fraction, int]:
    """A number with its fraction or its dozens, and how many words it took; 0 words where there is none."""
    value, n = _mixed(words)
    return (12 * value, n + 1) if n and words[n : n + 1] == ["dozen"] else (value, n)


def _mixed(words: list[str]) -> tuple[Fraction, int]:
    value, n = _whole(words)
    ordinal = value >= 20 and words[n : n + 1] and re.fullmatch(r"third|[a-z]+th", words[n])
    if n and words[n : n + 1] and words[n] in _PARTS and not ordinal:
        return Fraction(value, _PARTS[words[n]]), n + 1  # three quarters, but not twenty-fifth
    tail = words[n : n + 3]
    if n and tail[:1] == ["and"]:  # two and a half, two and three quarters
        part = (1, 1) if tail[1:2] == ["a"] else _whole(tail[1:2])
        if part[1] and len(tail) == 3 and tail[2] in _PARTS:
            return value + Fraction(part[0], _PARTS[tail[2]]), n + 3
    return Fraction(value), n


def _whole(words: list[str]) -> tuple[int, int]:
    """A whole number below 10^15 and how many words it took: one hundred and five thousand two."""
    total = group = n = 0
    room = 100  # what the next word must be below: "twenty five", not "five twenty"
    scale = 10**15
    for i, word in enumerate(words):
        if word in _UNITS and _UNITS[word] < room and not (n and _UNITS[word] == 0):
            group += _UNITS[word]
            room = 10 if _UNITS[word] >= 20 else 0
        elif word == "hundred" and 0 < group < 10:
            group, room = 100 * group, 100
        elif word in _SCALES and group > 0 and _SCALES[word] < scale:
            scale = _SCALES[word]
            total, group, room = total + group * scale, 0, 100
        elif word == "and" and n and words[n - 1] in ("hundred", *_SCALES) and words[i + 1 : i + 2] != ["a"]:
            continue
        else:
            break
        n = i + 1
    return total + group, n
