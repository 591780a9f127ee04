"""The end of a run: summary.json, and the picture and the page beside it.

summary.json also says whether a run is finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_lora.metrics.collapse import run_warnings
from rl_lora.metrics.records import MAX_REASONS, MetricsFile, Record
from rl_lora.metrics.samples import Sample, content_hash
from rl_lora.metrics.summary import change
from rl_lora.report.reward_plot import plot_rewards
from rl_lora.report.run_samples import read_held_out
from rl_lora.report.training_page import training_page
from rl_lora.system import files
from rl_lora.system import finite_json as json

N_TRANSCRIPTS = 3
FIELDS = {
    *("steps", "before", "after", "reward_first", "reward_last", "learned", "seconds"),
    *("adapter", "best_checkpoint", "best_score", "transcripts", "next"),
}
"""Fields of summary.json in every version."""
AGAIN = "it is written again at the end of the run"


def write_results(
    run_dir: Path, steps: int, *, adapter: Path, best: tuple[Path, float] | None, next_command: str
) -> None:
    """Write summary.json, reward.png and report.html of a run that has come to its last step.

    `best`: the checkpoint with the highest held-out score, and that score. Raises FileError.
    """
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    evals, train = metrics.read("eval"), metrics.read("train")
    before, after = (read_held_out(run_dir, step) if evals else [] for step in (0, evals[-1]["step"] if evals else 0))
    summary: dict[str, Any] = {
        "steps": steps,
        "before": evals[0] if evals and evals[0]["step"] == 0 else None,
        "after": evals[-1] if evals else None,
        "reward_first": train[0]["reward"] if train else None,
        "reward_last": train[-1]["reward"] if train else None,
        "change": change(before, after) if before and after and evals[-1]["step"] else None,
        "warnings": run_warnings(before, after, train),
        "learned": any(record["tokens_learned"] for record in train),
        "scored": any(record["reward"] is not None for record in train),
        "unscorable": _reasons(train),
        "unscorable_held_out": _reasons(evals[-1:]),
        "seconds": sum(value for r in evals + train for name, value in r.items() if name.startswith("seconds/")),
        "adapter": str(adapter),
        "best_checkpoint": str(best[0]) if best else None,
        "best_score": best[1] if best else None,
        "transcripts": newly_solved(before, after),
        "next": next_command,
    }
    plot_rewards(train, evals, run_dir / "reward.png")
    files.write_text(run_dir / "report.html", training_page(run_dir))
    summary = json.loads(json.dumps(summary))  # as it will be read
    text = json.dumps(summary | {"hash": content_hash(summary)}, indent=1)
    files.write_text(run_dir / "summary.json", text + "\n")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Raises ValueError where summary.json has changed since it was written, FileNotFoundError where there is none."""
    path = run_dir / "summary.json"
    summary = files.read_json(path, AGAIN)
    known = summary.pop("hash", None) if isinstance(summary, dict) else "of something else"
    whole = summary.keys() >= FIELDS if known is None else known == content_hash(summary)  # older ones have none
    if not whole:
        raise ValueError(f"{path} has changed since it was written; {AGAIN}")
    return summary


def finished_at(run_dir: Path, steps: int) -> bool:
    """Whether the run is there to its last step. Raises ValueError for a summary that is damaged."""
    try:
        return bool(read_summary(run_dir).get("steps") == steps)
    except FileNotFoundError:
        return False


def newly_solved(before: Sequence[Sample], after: Sequence[Sample]) -> list[dict[str, str]]:
    """Held-out problems that are solved now and were not before, with both replies; the first few."""
    earlier = {sample["seed"]: sample for sample in before}
    solved = [s for s in after if s["seed"] in earlier and s["success"] and not earlier[s["seed"]]["success"]]
    return [
        {
            "problem": sample["observations"][0],
            "before": " / ".join(earlier[sample["seed"]]["completions"]),
            "after": " / ".join(sample["completions"]),
        }
        for sample in solved[:N_TRANSCRIPTS]
    ]


def _reasons(records: Sequence[Record]) -> dict[str, int]:
    """Why episodes could not be scored, over several records."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.get("unscorable_reasons", {}))
    return dict(counts.most_common(MAX_REASONS))
