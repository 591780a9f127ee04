"""The figures of an evaluation, for results.json, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl_lora.config import EvaluateConfig
from rl_lora.evaluation.candidates import BASE, step_of
from rl_lora.evaluation.missing import Occupancy
from rl_lora.metrics.collapse import reply_warning
from rl_lora.metrics.records import Record
from rl_lora.metrics.summary import compared, pairs, table_row
from rl_lora.system.plurals import counted


def ks_of(config: EvaluateConfig) -> list[int]:
    """The numbers k of pass@k and maj@k."""
    powers = [2**i for i in range(config.n.bit_length())]
    return sorted(set(config.k or [*powers, config.n]))


def results_of(config: EvaluateConfig, folders: dict[str, Path], rows: Sequence[list[dict[str, Any]]]) -> Record:
    """The figures: a row for the base and each adapter, and all pairs of them."""
    names, ks = [BASE, *folders], ks_of(config)
    matrix = pairs(rows, config.n, config.seed)
    against = None if config.against is None else names.index(config.against)
    records = []
    for i, (name, samples) in enumerate(zip(names, rows, strict=True)):
        folder = folders.get(name)
        place = {"name": name, "folder": str(folder or ""), "step": folder and step_of(folder)}
        versus = {"difference": compared(matrix[i][0])}
        if against is not None:
            versus["against"] = compared(matrix[i][against])
        records.append({**place, **table_row(samples, ks), **versus})
    base, *others = rows
    said = ((name, reply_warning(samples, base)) for name, samples in zip(folders, others, strict=True))
    warnings = [f"{name}: {warning}" for name, warning in said if warning]
    figures = {"k": ks, "rows": records, "pairs": matrix, "warnings": warnings}
    return {"kind": "evaluation", "config": asdict(config), **figures}


def savings(config: EvaluateConfig, results: Record, n_problems: int, occupancy: Occupancy) -> str:
    """One sentence on the cost, beside that of one command for each row."""
    n_rows, seconds, loading = len(results["rows"]), results["seconds"], results["seconds_loading"]
    found = f", {results['n_found']} of them from before" if results["n_found"] else ""
    what = f"{counted(n_rows, 'row')} x {counted(n_problems, 'problem')} x {counted(config.n, 'sample')}"
    text = f"{what}{found}, in {seconds:.0f} s"
    if occupancy.tokens:
        text += f" ({occupancy.tokens / seconds:.0f} tokens/s)"
    if n_rows > 1:
        text += f"\nthe base was loaded once, in {loading:.1f} s, instead of {n_rows} times"
        if occupancy.rows is not None:
            alone = min(config.max_rows, n_problems * config.n)
            text += (
                f"; {occupancy.rows:.0f} rows a forward pass on average, where one adapter alone has {alone} at most"
            )
    return text
