r"""Times of day: 8:40, 08:40, 7:45 p.m., 5 pm, 18:00, 9 o'clock, "3:30 in the afternoon", noon.

A time is no ratio and no quotient: 8:00 is not 11:00, though both would be divisions by zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HALF_DAY = r"[ap]\.?\s?m\b\.?"
PART_OF_DAY = rf"(?:{HALF_DAY}|(?:in\s+the\s+(?:morning|afternoon|evening)|at\s+night|noon|midnight)\b)"
_CLOCK = re.compile(
    r"(?:at )?(?P<hour>[0-9]{1,2})(?: ?: ?(?P<minute>[0-5][0-9])(?: ?: ?(?P<second>[0-5][0-9]))?)?"
    r"(?: ?(?P<sharp>o'clock))?"
    r"(?:,? ?(?:(?P<half>[ap])\.? ?m\.?|in the (?P<part>morning|afternoon|evening)|at (?P<night>night)"
    r"|(?P<named>noon|midnight)))?"
    r"(?(minute)(?: (?P<day>hours|hrs|uhr))?)",
    re.IGNORECASE,
)
_HINT = re.compile(r":|colon|[0-9}\s.]\s*[ap]\.?\s?m|{[ap]\.?m|clock|noon|night|morning|evening", re.IGNORECASE)
_NAMED = re.compile(r"(?:at )?(noon|midnight)", re.IGNORECASE)
_DRESS = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm|rm|colon)(?![a-zA-Z])|[*$~{}\\]|\s+")
_HALVES = {
    "a": "am",
    "p": "pm",
    "morning": "am",
    "afternoon": "pm",
    "evening": "pm",
    "night": "pm",
    "noon": "pm",
    "midnight": "am",
}


@dataclass(frozen=True)
class Clock:
    """`second` of the day, by the hands as they are written where no half of the day is named. `certain`: it can be
    nothing else; 3:30 could be a ratio."""

    second: int
    half: str | None
    certain: bool

    def equals(self, other: Clock) -> bool:
        """The same time. A half of the day on one side only is no conflict: 5:30 pm is 5:30, and it is 17:30."""
        if self.second == other.second or (self.half is None) == (other.half is None):
            return self.second == other.second
        named, bare = (other, self) if self.half is None else (self, other)
        hour = 3600
        return hour <= bare.second < 13 * hour and (named.second - bare.second) % (12 * hour) == 0


def clock(text: str) -> Clock | None:
    """The time of day that a text is, or None. A bare number is none."""
    if len(text) > 60 or not _HINT.search(text):
        return None
    if r"\colon" in text:
        text = text.replace(r"\colon", ":")
    text = " ".join(_DRESS.sub(" ", text).split())
    if match := _NAMED.fullmatch(text):
        text = f"12 {match[1]}"
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    if match["night"] and not 6 <= int(match["hour"]) <= 12:
        return None
    half = _HALVES.get((match["half"] or match["part"] or match["night"] or match["named"] or "").lower())
    if match["minute"] is None and half is None and not match["sharp"]:
        return None
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    if hour > 24 or (hour > 12 and half == "am") or (match["named"] and (hour, minute, second) != (12, 0, 0)):
        return None
    if half is not None:
        hour = hour % 12 + (12 if half == "pm" else 0)
    certain = bool(half or match["sharp"] or match["day"]) or match["minute"][0] == "0"
    return Clock((3600 * hour + 60 * minute + second) % 86400, half, certain)
