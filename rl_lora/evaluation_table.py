"""The table of an evaluation on the terminal: a row for the base and each adapter."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from rl_lora.metrics import Record

MAX_KS = 3
"""Of pass@k and maj@k; where there are more, the last one."""


def table(results: Record) -> Table:
    """Accuracy with its 95 % interval, differences in points with their p-value, pass@k, and the rest where it says
    something. The base is the first row."""
    rows = results["rows"]
    ks = [k for k in results["k"] if k > 1]
    ks = ks if len(ks) <= MAX_KS else ks[-1:]
    against = results["config"]["against"]
    columns = {"accuracy": _accuracy, "95 %": _interval, "to base": _versus("difference"), "p": _p("difference")}
    if against is not None:
        columns |= {f"to {against}": _versus("against"), "p ": _p("against")}
    columns |= {f"pass@{k}": _at("pass", k) for k in ks} | {f"maj@{k}": _at("majority", k) for k in ks}
    columns |= {"reward": _number("reward", ".3f"), "format": _number("format", ".0%")}
    columns |= {"cut off": _number("truncated", ".0%"), "unscorable": _number("unscorable", ".0%")}
    columns["tokens"] = _number("tokens_per_episode", ".1f")
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    optional = {"to base", "p", "format", *(f"maj@{k}" for k in ks)}
    if not any(row["unscorable"] for row in rows):
        del cells["unscorable"]
    shown = {name: column for name, column in cells.items() if name not in optional or set(column) != {"–"}}
    result = Table(show_edge=False, pad_edge=False)
    result.add_column("adapter", overflow="fold", min_width=10)
    for name in shown:
        result.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        result.add_row(Text(row["name"]), *(column[i] for column in shown.values()))
    return result


def _accuracy(row: Record) -> str:
    return _text(row["accuracy"], ".1%")


def _interval(row: Record) -> str:
    return f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}" if "accuracy_low" in row else "–"


def _versus(name: str) -> Any:
    return lambda row: "–" if row[name] is None else f"{100 * row[name]['value']:+.1f}"


def _p(name: str) -> Any:
    return lambda row: "–" if row[name] is None else p_text(row[name]["p"])


def _at(kind: str, k: int) -> Any:
    return lambda row: _text(row[kind].get(str(k), {}).get("value"), ".1%")


def _number(name: str, form: str) -> Any:
    return lambda row: _text(row[name], form)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
