"""The file of samples from which an evaluation goes on where it stopped.

A sample is known by the content of what it came from: problem, weights, and the settings that decide what is drawn and
how it is judged. Names and paths do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rl_lora.metrics.samples import Sample
from rl_lora.system import files
from rl_lora.system import finite_json as json

Key = tuple[Any, ...]
IDENTITY = ("adapter_hash", "sampling_hash", "problem", "k")
"""The fields that make the key of a sample: two records of the same sample agree in them."""


def key_of(sample: Mapping[str, Any]) -> Key:
    return tuple(sample.get(name) for name in IDENTITY)


class SampleStore:
    """samples.jsonl in `folder`, open for one evaluation at a time.

    Args:
        wanted: the keys of all samples of this evaluation, in order, and the rows of the table that each belongs to.
        resume: whether samples that are there already are taken over.

    What the file held and is not wanted is kept in earlier.jsonl, and taken from there when it is wanted again. Both
    files are there as they were or as they become, whenever the process dies.

    Raises:
        ValueError: another process has it open; a line that is no JSON (of a last line without an end, nothing is said:
            a process died there).
        FileError: the disk is full, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, wanted: Mapping[Key, Sequence[str]], resume: bool = True):
        self.path, self.wanted = folder / "samples.jsonl", wanted
        self._lock = files.lock(folder, "another evaluation", "choose another --out")
        try:
            files.clear_left_overs(folder, "samples.jsonl", "earlier.jsonl", "results.json", "report.html")
            self._open(folder / "earlier.jsonl", resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, earlier: Path, resume: bool) -> None:
        there: dict[Key, Sample] = {}
        for i, sample in enumerate([*read_sample_file(earlier), *read_sample_file(self.path)]):
            key = key_of(sample)
            there[("unknown", i) if None in key else key] = sample
        found = {key: there.pop(key) for key in self.wanted if key in there}
        self.samples = {key: sample for key, sample in found.items() if resume and not sample.get("failed")}
        self.n_found = len(self.samples)
        others = bool(there) or earlier.exists()
        if others:
            _replace(earlier, [*there.values(), *found.values()])  # nothing is only in memory, at any time
        _replace(self.path, self._rows(self.samples.values()))
        if others:
            _replace(earlier, there.values())

    def append(self, samples: Iterable[Sample]) -> None:
        """Samples that were drawn: on the disk when this returns, but for those that failed (`append_failed`)."""
        samples = list(samples)
        self.samples |= {key_of(sample): sample for sample in samples}
        self._write([sample for sample in samples if not sample["failed"]])

    def append_failed(self) -> None:
        """At the end of an evaluation: write down the samples that failed. The next evaluation draws them again."""
        self._write([sample for sample in self.samples.values() if sample.get("failed")])

    def _write(self, samples: Sequence[Sample]) -> None:
        files.append_text(self.path, "".join(json.dumps(row) + "\n" for row in self._rows(samples)))

    def row(self, name: str) -> list[Sample]:
        """The samples of one row of the table so far, in the order of `wanted`."""
        return [
            self.samples[key] | {"adapter": name}
            for key, names in self.wanted.items()
            if name in names and key in self.samples
        ]

    def _rows(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        """A line for each row of the table: adapters with the same weights share what was drawn."""
        return (sample | {"adapter": name} for sample in samples for name in self.wanted[key_of(sample)])

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_sample_file(path: Path) -> list[Sample]:
    """The records of a file of samples; none where there is no file. See `SampleStore`."""
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    samples = []
    for i, line in enumerate(lines, 1):
        try:
            samples.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {i} is no JSON ({error}); mend or remove it") from error
    try:
        return [*samples, json.loads(torn)] if torn else samples
    except ValueError:
        return samples


def _replace(path: Path, samples: Iterable[Sample]) -> None:
    files.write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))
