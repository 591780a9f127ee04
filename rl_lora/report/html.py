"""Reports as one page of HTML that needs no network: what all have in common, and the page of an evaluation.

Python says what stands on a page, `page_assets/` how it looks: a Jinja2 template that escapes everything, a style
sheet, and script that draws charts (charts.js) and browses samples (page.js). What models wrote is data in a JSON
block, which the script puts onto the page as text; a content security policy lets no other script run.
`training_page.py` is the page of a training run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from rl_lora.metrics.records import Record
from rl_lora.system import files as disk

Chart = dict[str, Any]
"""title, note, kind, unit, x, series and reference, as charts.js describes them."""


def evaluation_page(results: dict[str, Any], samples: Iterable[dict[str, Any]]) -> str:
    """The page of an evaluation, from what `results.json` and `samples.jsonl` hold. Any number may be None."""
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
        lede=facts(
            ("model", (config.get("model") or {}).get("name")),
            ("rows", len(rows)),
            ("problems", max((row.get("n_problems") or 0 for row in rows), default=0)),
            ("samples", sum(row.get("n_samples") or 0 for row in rows)),
            ("temperature", config.get("temperature")),
            ("time", duration(results.get("seconds"))),
        ),
        headline=_evaluation_headline(base, best, measure),
        sections=[{"title": "", "charts": [chart for chart in charts if chart["series"]]}],
        table=_table(rows),
        matrix=(matrix := _matrix(names, results.get("pairs"))),
        n_pairs=(n_pairs := sum(pair is not None for line in matrix for pair in line) // 2),
        by_chance=f"{0.05 * n_pairs:.0f}" if n_pairs > 10 else f"{0.05 * n_pairs:.1f}",
        warnings=results.get("warnings") or [],
        browser=browser(samples, names, pair=[best["name"], base["name"]] if best and base else []),
        sampled=[],
        changed=[],
        config=flat(config | {"hashes": results.get("hashes") or {}}),
    )


def write(page: str, path: Path) -> None:
    """Put the page in its place, whole. Raises FileError."""
    disk.write_text(path, page)


def render(**parts: Any) -> str:
    assets = files("rl_lora.report") / "page_assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "".join((assets / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"sha256": _sha256, "json": _json}
    template = environment.from_string((assets / "page.html").read_text(encoding="utf-8"))
    return template.render(style=style, script=script, **parts)


def _sha256(text: str) -> str:
    """As a content security policy names the one script or style that it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: no < and no &, and no number that JSON does not have."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): finite(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


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


def point(x: float, row: Record, measure: str) -> list[float | None]:
    return [x, row.get(measure), row.get(f"{measure}_low"), row.get(f"{measure}_high")]


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


def browser(
    samples: Iterable[dict[str, Any]],
    names: Sequence[str],
    pair: Sequence[str] = (),
    order: Callable[[dict[str, Any]], int] | None = None,
) -> dict[str, Any]:
    """Samples by problem and row. `pair`: two rows whose differences are offered as shortcuts; `order` sorts."""
    rows = {name: i for i, name in enumerate(names)}
    problems: dict[tuple[Any, Any], dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["adapter"] or "base", len(rows))
        said, replies = (
            list(sample.get("observations") or [""]),
            sample.get("completions") or sample.get("replies") or [],
        )
        problem = problems.setdefault(
            (sample.get("problem"), sample.get("seed")),
            {"seed": sample.get("seed"), "prompt": said[0], "reference": sample.get("reference"), "samples": {}},
        )
        entry = {
            "texts": [
                text for i, reply in enumerate(replies) for text in ([said[i]] if 0 < i < len(said) else []) + [reply]
            ],
            "reward": sample.get("reward"),
            "success": sample.get("success"),
            "answer": sample.get("answer"),
            "truncated": sample.get("truncated") or None,
            "unscorable": sample.get("unscorable") or None,
            "tokens": sample.get("tokens"),
            "parts": sample.get("reward_parts") or None,
        }
        kept = {name: value for name, value in entry.items() if value is not None}
        problem["samples"].setdefault(row, []).append(kept)
    listed = [problem | {"number": i + 1} for i, problem in enumerate(problems.values())]
    if order is not None:
        listed.sort(key=order)
    return {"rows": list(rows), "problems": listed, "pair": [rows[name] for name in pair]}


def _evaluation_headline(base: Record | None, best: Record | None, measure: str) -> list[dict[str, str]]:
    """The figures to read first: the base, the best row, and what is between them."""
    figures = [
        figure(f"{measure}, {row['name']}", row, measure, "" if row is base else "the highest here")
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
                "detail": ", ".join(filter(None, [interval, p_value(difference.get("p"))])),
            }
        )
    return figures


def figure(label: str, record: Record, measure: str, note: str = "") -> dict[str, str]:
    """One of the headline's: a number with its interval."""
    low, high = record.get(f"{measure}_low"), record.get(f"{measure}_high")
    interval = f"95 %: {100 * low:.1f} to {100 * high:.1f}" if low is not None and high is not None else ""
    value = percent(record[measure]) if measure == "accuracy" else number(record[measure])
    return {"label": label, "value": value, "detail": ", ".join(filter(None, [interval, note]))}


def _table(rows: Sequence[Record]) -> dict[str, Any]:
    """The results, without the columns that no row has something for; each cell with what it is sorted by."""
    columns: dict[str, tuple[Callable[[Record], Any], Callable[[Any], str]]] = {
        "row": (_at("name"), str),
        "step": (_at("step"), "{:,}".format),
        "accuracy": (_at("accuracy"), percent),
        "95 %": (_both(_at("accuracy_low"), _at("accuracy_high")), lambda v: f"{100 * v[0]:.1f} to {100 * v[1]:.1f}"),
        "to base": (_at("difference", "value"), signed),
        "its 95 %": (_both(_at("difference", "low"), _at("difference", "high")), lambda v: points(*v)),
        "p": (_at("difference", "p"), _small),
    }
    for field, name in (("pass", "pass"), ("majority", "maj")):
        for k in sorted({int(k) for row in rows for k in row.get(field) or {}}):
            if (field, k) != ("pass", 1):  # the accuracy, once more
                columns[f"{name}@{k}"] = (_at(field, str(k), "value"), percent)
    columns |= {
        "reward": (_at("reward"), number),
        "format": (_at("format"), percent),
        "cut off": (_at("truncated"), percent),
        "unscorable": (_at("unscorable"), percent),
        "tokens": (_at("tokens_per_episode"), "{:,.1f}".format),
        "samples": (_at("n_samples"), "{:,}".format),
    }
    values = {name: [value(row) for row in rows] for name, (value, _) in columns.items()}
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    kept = [name for name, column in known.items() if any(column) or (column and name != "unscorable")]
    cells = [
        [("–", None) if (v := values[name][i]) is None else (columns[name][1](v), _sorted_by(v)) for name in kept]
        for i in range(len(rows))
    ]
    return {"columns": kept, "rows": cells}


def _at(*path: str) -> Callable[[Record], Any]:
    """What stands at a path of nested dictionaries, or None."""

    def value(row: Record) -> Any:
        found: Any = row
        for key in path:
            found = (found or {}).get(key)
        return found

    return value


def _both(low: Callable[[Record], Any], high: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """The ends of an interval, or None."""
    return lambda row: None if None in (ends := (low(row), high(row))) else ends


def _sorted_by(value: Any) -> float | None:
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
            detail = ", ".join(filter(None, [points(pair.get("low"), pair.get("high")), p_value(p)]))
            matrix[-1].append(
                {
                    "text": signed(difference),
                    "p": "" if p is None else _small(p),
                    "detail": f"{names[i]} minus {names[j]}: {signed(difference)} points, {detail}",
                    "sign": f"{'up' if difference > 0 else 'down'}{sure}" if sure else "",
                }
            )
    return matrix


def facts(*pairs: tuple[str, Any]) -> list[tuple[str, str]]:
    """What is known of them, as text."""
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in pairs
        if value not in (None, "")
    ]


def flat(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of nested dictionaries, values as JSON has them."""
    if not isinstance(config, dict) or (prefix and not config):
        return [(prefix, config if isinstance(config, str) else json.dumps(config, ensure_ascii=False, default=str))]
    return [line for key, value in config.items() for line in flat(value, f"{prefix}.{key}" if prefix else str(key))]


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a .jsonl file, but for lines that are damaged or being written; none where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def signed(difference: float) -> str:
    """In points of accuracy; no minus before a zero."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def points(low: float | None, high: float | None) -> str:
    """An interval of a difference, in points of accuracy."""
    return "" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def p_value(p: float | None) -> str:
    return "" if p is None else f"p {'' if p < 0.001 else '= '}{_small(p)}"


def _small(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str | None:
    """Seconds as people say them."""
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
