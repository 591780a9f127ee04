"""Reports as one page of HTML that needs no network: the parts that the pages of runs and evaluations share.

Python decides the content of a page, `page_assets/` its look: a Jinja2 template that escapes everything, a style
sheet, and script that draws charts (charts.js) and browses samples (page.js). What models wrote is data in a JSON
block, which the script puts onto the page as text; a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

import jinja2

from rl_lora.metrics.records import Record
from rl_lora.report.formats import number, percent, percents
from rl_lora.system import finite_json

Chart = dict[str, Any]
"""title, note, kind, unit, x, series and reference, as charts.js describes them."""


def render(**parts: Any) -> str:
    """The page. `parts`: a value for every name in page.html."""
    assets = files("rl_lora.report") / "page_assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "".join((assets / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"sha256": _sha256, "json": _script_json}
    template = environment.from_string((assets / "page.html").read_text(encoding="utf-8"))
    return template.render(style=style, script=script, **parts)


def _sha256(text: str) -> str:
    """A text's hash, by which a content security policy lets it through as script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no < and no &, and no number that JSON does not have."""
    text = finite_json.dumps(value, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def point(x: float, row: Record, measure: str) -> list[float | None]:
    """A point of a chart, with the ends of its interval where there is one."""
    return [x, row.get(measure), row.get(f"{measure}_low"), row.get(f"{measure}_high")]


def headline_figure(label: str, record: Record, measure: str, note: str = "") -> dict[str, str]:
    """A number with its interval, to stand at the top of a page."""
    low, high = record.get(f"{measure}_low"), record.get(f"{measure}_high")
    interval = f"95 %: {percents(low, high)}" if low is not None and high is not None else ""
    value = percent(record[measure]) if measure == "accuracy" else number(record[measure])
    return {"label": label, "value": value, "detail": ", ".join(filter(None, [interval, note]))}


def sample_browser(
    samples: Iterable[dict[str, Any]],
    names: Sequence[str],
    pair: Sequence[str] = (),
    order: Callable[[dict[str, Any]], int] | None = None,
) -> dict[str, Any]:
    """The data of the browser of samples: by problem, then by row.

    `pair`: two rows whose differences are offered as shortcuts. `order`: sort key of a problem.
    """
    rows = {name: i for i, name in enumerate(names)}
    problems: dict[tuple[Any, Any], dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["adapter"] or "base", len(rows))
        asked = list(sample.get("observations") or [""])
        replies = sample.get("completions") or sample.get("replies") or []
        problem = problems.setdefault(
            (sample.get("problem"), sample.get("seed")),
            {"seed": sample.get("seed"), "prompt": asked[0], "reference": sample.get("reference"), "samples": {}},
        )
        entry = {
            "texts": [
                text for i, reply in enumerate(replies) for text in ([asked[i]] if 0 < i < len(asked) else []) + [reply]
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


def known_facts(*pairs: tuple[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, without those that are None or empty."""
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in pairs
        if value not in (None, "")
    ]


def setting_texts(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of nested dictionaries, values as JSON has them."""
    if not isinstance(config, dict) or (prefix and not config):
        return [(prefix, config if isinstance(config, str) else json.dumps(config, ensure_ascii=False, default=str))]
    names = {key: f"{prefix}.{key}" if prefix else str(key) for key in config}
    return [line for key, value in config.items() for line in setting_texts(value, names[key])]
