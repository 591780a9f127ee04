"""samples/: episodes as they were sampled in training, a file a step, within a bound on their size.

Held-out episodes are in evals/. Left out: what was learned from them, which metrics.jsonl has by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rl_lora.metrics.samples import Sample, sample_of
from rl_lora.report.html import lines
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.types import Group

FOLDER = "samples"
MIB = 1 << 20


def write_samples(run_dir: Path, step: int, groups: Sequence[Group], n: int, max_mib: float) -> None:
    """Write about n episodes of a step, in whole groups and at least one, as samples/step-N.jsonl.

    Where the folder then holds more than `max_mib` MiB, files between others are removed, so that the steps that are
    left are spread evenly; the first and the newest stay.
    """
    if n == 0:
        return
    chosen: list[Sample] = []
    for group in groups:
        if chosen and len(chosen) + len(group.episodes) > n:
            break
        chosen += [sample_of(episode, k, step=step) for k, episode in enumerate(group.episodes)]
    path = _path(run_dir, step)
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(sample) + "\n" for sample in chosen))
    _thin(run_dir, int(max_mib * MIB))


def stored_steps(run_dir: Path) -> list[int]:
    """The steps whose episodes are there, in their order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run_dir / FOLDER).glob("step-*.jsonl"))


def read_samples(run_dir: Path, step: int) -> list[Sample]:
    """The episodes of a step that were kept."""
    return list(lines(_path(run_dir, step)))


def rewind_samples(run_dir: Path, step: int) -> None:
    """Forget the episodes after `step`: a resumed run samples them again."""
    for later in (s for s in stored_steps(run_dir) if s > step):
        _path(run_dir, later).unlink()


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}.jsonl"


def _thin(run_dir: Path, max_bytes: int) -> None:
    steps = stored_steps(run_dir)
    sizes = {step: _path(run_dir, step).stat().st_size for step in steps}
    while sum(sizes.values()) > max_bytes and len(steps) > 2:
        gaps = [after - before for (before, _), (_, after) in pairwise(pairwise(steps))]
        removed = steps.pop(1 + gaps.index(min(gaps)))  # the oldest of those that are missed least
        _path(run_dir, removed).unlink()
        del sizes[removed]
