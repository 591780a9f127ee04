"""The tables of an evaluation on the terminal: a row for the base and each adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rl_lora.metrics.records import Record
from rl_lora.report.formats import formatted, p_value, signed
from rl_lora.system.terminal import Terminal, in_line

Column = Callable[[Record], str]
MAX_KS = 3
"""Most values of k that get columns of pass@k and maj@k; of more, only the largest does."""


def show(console: Console, results: Record) -> None:
    """Print the tables whole: where they are wider than the terminal, its lines break, not their cells."""
    for each in tables(results):
        width = Measurement.get(console, console.options.update(width=1000), each).maximum
        Terminal(file=console.file, width=max(width, console.width), soft_wrap=False).print(each)


def tables(results: Record) -> list[Table]:
    """Accuracy with its 95 % interval, differences in points with their p-values, and further columns that are not
    empty; then, for several samples a problem, pass@k and maj@k. The base is the first row."""
    rows, against = results["rows"], results["config"]["against"]
    columns = {"accuracy": _number("accuracy", ".1%"), "95 %": _interval}
    columns |= {"to base": _versus("difference"), "p": _p("difference")}
    if against is not None:
        columns |= {f"to {in_line(against)}": _versus("against"), "p ": _p("against")}
    columns |= {"reward": _number("reward", ".3f"), "format": _number("format", ".0%")}
    columns |= {"cut off": _number("truncated", ".0%"), "unscorable": _number("unscorable", ".0%")}
    columns["tokens"] = _number("tokens_per_episode", ".1f")
    empty = {"to base": "–", "p": "–", "format": "–", "unscorable": "0%"}
    found = [_table(rows, columns, empty)]
    ks = [k for k in results["k"] if k > 1]
    ks = ks if len(ks) <= MAX_KS else ks[-1:]
    several = {f"pass@{k}": _at("pass", k) for k in ks} | {f"maj@{k}": _at("majority", k) for k in ks}
    return [*found, _table(rows, several, {f"maj@{k}": "–" for k in ks})] if several else found


def _table(rows: Sequence[Record], columns: Mapping[str, Column], empty: Mapping[str, str]) -> Table:
    """A table without the columns whose cells are all equal to the text in `empty`."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    result.add_column("adapter", overflow="fold", min_width=10)
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {empty.get(name)}}
    for name in cells:
        result.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        result.add_row(Text(in_line(row["name"])), *(column[i] for column in cells.values()))
    return result


def _interval(row: Record) -> str:
    return f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}" if "accuracy_low" in row else "–"


def _versus(name: str) -> Column:
    return lambda row: "–" if row[name] is None else signed(row[name]["value"])


def _p(name: str) -> Column:
    return lambda row: "–" if row[name] is None else p_value(row[name]["p"])


def _at(kind: str, k: int) -> Column:
    def cell(row: Record) -> str:
        found = row[kind].get(str(k))
        return "–" if found is None else f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"

    return cell


def _number(name: str, form: str) -> Column:
    return lambda row: formatted(row[name], form)
