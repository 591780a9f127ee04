"""The page of an evaluation: rows compared, pass@k and maj@k, every pair of rows, and the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rl_lora.metrics.records import Record
from rl_lora.report.formats import duration, number, p_equation, p_value, percent, percents, points, signed
from rl_lora.report.html import Chart, headline_figure, known_facts, point, render, sample_browser, setting_texts


def evaluation_page(results: dict[str, Any], samples: Iterable[dict[str, Any]]) -> str:
    """The page of an evaluation, from results.json and samples.jsonl. Any number may be None."""
    rows: list[Record] = results["rows"]
    base = next((row for row in rows if not row.get("folder")), None)
    measure = "accuracy" if any(row.get("accuracy") is not None for row in rows) else "reward"
    best = max(
        (row for row in rows if row is not base and row.get(measure) is not None),
        key=lambda row: float(row[measure]),
        default=None,
    )
    config = results.get("config") or {}
    charts = [_comparison(rows, base, measure), *_curves(rows)]
    names = [row["name"] for row in rows]
    return render(
        kind="Evaluation",
        title=(config.get("env") or {}).get("id") or "Evaluation",
        facts=known_facts(
            ("model", (config.get("model") or {}).get("name")),
            ("rows", len(rows)),
            ("problems", max((row.get("n_problems") or 0 for row in rows), default=0)),
            ("samples", sum(row.get("n_samples") or 0 for row in rows)),
            ("temperature", config.get("temperature")),
            ("time", duration(results.get("seconds"))),
        ),
        headline=_headline(base, best, measure),
        sections=[{"title": "", "charts": [chart for chart in charts if chart["series"]]}],
        table=_table(rows),
        matrix=(matrix := _matrix(names, results.get("pairs"))),
        n_pairs=(n_pairs := sum(pair is not None for line in matrix for pair in line) // 2),
        by_chance=f"{0.05 * n_pairs:.0f}" if n_pairs > 10 else f"{0.05 * n_pairs:.1f}",
        warnings=results.get("warnings") or [],
        browser=sample_browser(samples, names, pair=[best["name"], base["name"]] if best and base else []),
        sampled=[],
        changed=[],
        config=setting_texts(config | {"hashes": results.get("hashes") or {}}),
    )


def _headline(base: Record | None, best: Record | None, measure: str) -> list[dict[str, str]]:
    """The figures to read first: the base, the best row, and their difference."""
    figures = [
        headline_figure(f"{measure}, {row['name']}", row, measure, "" if row is base else "the highest here")
        for row in (base, best)
        if row is not None and row.get(measure) is not None
    ]
    difference = (best or {}).get("difference")
    if difference and difference.get("value") is not None and measure == "accuracy":
        interval = points(difference.get("low"), difference.get("high"))
        figures.append(
            {
                "label": "difference to the base",
                "value": f"{signed(difference['value'])} points",
                "detail": ", ".join(filter(None, [interval, p_equation(difference.get("p"))])),
            }
        )
    return figures


def _comparison(rows: Sequence[Record], base: Record | None, measure: str) -> Chart:
    """Over steps where every adapter has one and they differ, a line a run; over rows otherwise."""
    others = [row for row in rows if row is not base]
    chart: Chart = {
        "title": measure.capitalize(),
        "unit": "percent" if measure == "accuracy" else "number",
        "note": "With 95 % intervals." if measure == "accuracy" else "The environment gives no verdict.",
        "x": "step",
        "reference": None,
    }
    if all(row.get("step") is not None for row in others) and len({row["step"] for row in others}) > 1:
        runs: dict[str, list[Record]] = {}
        for row in sorted(others, key=lambda row: row["step"]):
            runs.setdefault(str(row.get("folder")).partition("/checkpoints/")[0], []).append(row)
        series = [
            {"name": name if len(runs) > 1 else measure, "points": [point(row["step"], row, measure) for row in run]}
            for name, run in runs.items()
        ]
        reference = {"name": base["name"], "point": point(0, base, measure)} if base else None
        return chart | {"kind": "line", "series": series, "reference": reference}
    series = [{"name": row["name"], "points": [point(0, row, measure)]} for row in rows]
    return chart | {"kind": "rows", "series": series, "reference": rows.index(base) if base else None}


def _curves(rows: Sequence[Record]) -> list[Chart]:
    """pass@k and maj@k, where there are several k."""
    notes = {
        "pass": "Probability that at least one of k samples is right; unbiased.",
        "majority": "Probability that the most frequent answer of k samples is right.",
    }
    curves = []
    for field, note in notes.items():
        series = [
            {
                "name": row["name"],
                "points": [[int(k), v.get("value"), v.get("low"), v.get("high")] for k, v in row[field].items() if v],
            }
            for row in rows
            if row.get(field)
        ]
        several = any(len(line["points"]) > 1 for line in series)
        curves.append(
            {
                "title": "pass@k" if field == "pass" else "maj@k",
                "note": note,
                "kind": "line",
                "unit": "percent",
                "x": "k",
                "series": series if several else [],
                "reference": None,
            }
        )
    return curves


def _table(rows: Sequence[Record]) -> dict[str, Any]:
    """The table of results without its empty columns; each cell is a text and its sort key."""
    columns: dict[str, tuple[Callable[[Record], Any], Callable[[Any], str]]] = {
        "row": (_field("name"), str),
        "step": (_field("step"), "{:,}".format),
        "accuracy": (_field("accuracy"), percent),
        "95 %": (_interval(_field("accuracy_low"), _field("accuracy_high")), lambda v: percents(*v)),
        "to base": (_field("difference", "value"), signed),
        "its 95 %": (_interval(_field("difference", "low"), _field("difference", "high")), lambda v: points(*v)),
        "p": (_field("difference", "p"), p_value),
    }
    for field, name in (("pass", "pass"), ("majority", "maj")):
        for k in sorted({int(k) for row in rows for k in row.get(field) or {}}):
            if (field, k) != ("pass", 1):  # the accuracy, once more
                columns[f"{name}@{k}"] = (_field(field, str(k), "value"), percent)
    columns |= {
        "reward": (_field("reward"), number),
        "format": (_field("format"), percent),
        "cut off": (_field("truncated"), percent),
        "unscorable": (_field("unscorable"), percent),
        "tokens": (_field("tokens_per_episode"), "{:,.1f}".format),
        "samples": (_field("n_samples"), "{:,}".format),
    }
    values = {name: [value(row) for row in rows] for name, (value, _) in columns.items()}
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    kept = [name for name, column in known.items() if any(column) or (column and name != "unscorable")]
    cells = [
        [("–", None) if (v := values[name][i]) is None else (columns[name][1](v), _sort_key(v)) for name in kept]
        for i in range(len(rows))
    ]
    return {"columns": kept, "rows": cells}


def _field(*path: str) -> Callable[[Record], Any]:
    """The value at a path of nested dictionaries, or None."""

    def value(row: Record) -> Any:
        found: Any = row
        for key in path:
            found = (found or {}).get(key)
        return found

    return value


def _interval(low: Callable[[Record], Any], high: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """The ends of an interval, or None."""
    return lambda row: None if None in (ends := (low(row), high(row))) else ends


def _sort_key(value: Any) -> float | None:
    return None if isinstance(value, str) else value[0] if isinstance(value, tuple) else value


def _matrix(names: Sequence[str], pairs: Sequence[Sequence[Record | None]] | None) -> list[list[dict[str, Any] | None]]:
    """Row minus column, in points of accuracy; `sign` says how sure the direction is: p < 0.05, p < 0.01."""
    if not pairs or len(names) < 2:
        return []
    matrix: list[list[dict[str, Any] | None]] = []
    for i, row in enumerate(pairs):
        matrix.append([])
        for j, pair in enumerate(row):
            if i == j or not pair or pair.get("difference") is None:
                matrix[-1].append(None)
                continue
            difference, p = pair["difference"], pair.get("p")
            sure = 0 if p is None or p >= 0.05 or not difference else 1 if p >= 0.01 else 2
            detail = ", ".join(filter(None, [points(pair.get("low"), pair.get("high")), p_equation(p)]))
            matrix[-1].append(
                {
                    "text": signed(difference),
                    "p": "" if p is None else p_value(p),
                    "detail": f"{names[i]} minus {names[j]}: {signed(difference)} points, {detail}",
                    "sign": f"{'up' if difference > 0 else 'down'}{sure}" if sure else "",
                }
            )
    return matrix
