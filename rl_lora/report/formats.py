"""Numbers as reports write them."""

from __future__ import annotations


def formatted(value: float | None, form: str) -> str:
    """`format(value, form)`, or a dash where there is no number."""
    return "–" if value is None else format(value, form)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percents(low: float, high: float) -> str:
    """The interval of a share, in percent."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def signed(difference: float) -> str:
    """A difference in points of accuracy; no minus before a zero."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def points(low: float | None, high: float | None) -> str:
    """The interval of a difference, in points of accuracy."""
    return "" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def p_value(p: float) -> str:
    """A p-value, as it stands under the heading "p"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equation(p: float | None) -> str:
    """A p-value, as it stands in a line of text."""
    return "" if p is None else f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def duration(seconds: float | None) -> str | None:
    """Seconds as people say them."""
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
