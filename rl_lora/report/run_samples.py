"""The episodes that a run keeps, a file a step: samples/ holds sampled ones, within a bound, evals/ held-out ones.

Figures of the learner are not here: metrics.jsonl has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rl_lora.metrics.samples import Sample, sample_of
from rl_lora.system import files
from rl_lora.system import finite_json as json
from rl_lora.types import Group

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
    _write(_sampled(run_dir, step), chosen)
    _thin(run_dir, int(max_mib * MIB))


def stored_steps(run_dir: Path) -> list[int]:
    """The steps whose sampled episodes are there, in their order."""
    return _steps(run_dir / "samples")


def read_samples(run_dir: Path, step: int) -> list[Sample]:
    """The sampled episodes of a step that were kept."""
    return list(files.read_json_lines(_sampled(run_dir, step)))


def write_held_out(run_dir: Path, step: int, samples: Sequence[Sample]) -> None:
    """Write the held-out episodes of an evaluation as evals/step-N.jsonl."""
    _write(_held_out(run_dir, step), samples)


def read_held_out(run_dir: Path, step: int) -> list[Sample]:
    """The held-out episodes of an evaluation; none where there was no such evaluation."""
    return list(files.read_json_lines(_held_out(run_dir, step)))


def rewind_episodes(run_dir: Path, step: int, evaluated: bool = True) -> None:
    """Delete the episodes after `step`: a resumed run plays them again; without `evaluated`, its held-out ones too."""
    stale = [_sampled(run_dir, later) for later in stored_steps(run_dir) if later > step]
    first = step + (evaluated and step > 0)
    stale += [_held_out(run_dir, later) for later in _steps(run_dir / "evals") if later >= first]
    for path in stale:
        with files.writing(path):
            path.unlink()


def _sampled(run_dir: Path, step: int) -> Path:
    return run_dir / "samples" / f"step-{step:06d}.jsonl"


def _held_out(run_dir: Path, step: int) -> Path:
    return run_dir / "evals" / f"step-{step:06d}.jsonl"


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.jsonl"))


def _write(path: Path, samples: Sequence[Sample]) -> None:
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))


def _thin(run_dir: Path, max_bytes: int) -> None:
    steps = stored_steps(run_dir)
    sizes = {step: _sampled(run_dir, step).stat().st_size for step in steps}
    while sum(sizes.values()) > max_bytes and len(steps) > 2:
        gaps = [after - before for (before, _), (_, after) in pairwise(pairwise(steps))]
        removed = steps.pop(1 + gaps.index(min(gaps)))  # the oldest in the smallest gap
        _sampled(run_dir, removed).unlink()
        del sizes[removed]
