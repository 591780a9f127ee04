"""Eight adapters and the base in one evaluation against nine evaluations in a row.

Both sides are the command itself, in processes of their own and in turns; the nine write to one folder, so that each
draws one row only. What both drew is compared sample by sample.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

import torch
from rich.table import Table

from rl_lora.config import ModelConfig, expand_home
from rl_lora.evaluation.sample_store import key_of, read_sample_file
from rl_lora.lora.peft_io import save_adapter
from rl_lora.policy.policy import Policy
from rl_lora.scripts.command import main as command
from rl_lora.system.terminal import Terminal

NOISE = 1e-3
"""Standard deviation of B: enough for other replies than the base's, and not for noise."""
EVALUATE = Path(__file__).parents[1] / "evaluate.py"


@dataclass
class EvaluationBenchmarkConfig:
    """Measure the saving by evaluating adapters together, on two-digit additions."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: Annotated[int, Ge(1)] = 8
    """Random adapters of rank 1 to evaluate."""
    limit: Annotated[int, Ge(1)] = 64
    """Problems to evaluate on."""
    max_tokens: Annotated[int, Ge(1)] = 16
    """Limit of one reply in tokens."""
    rounds: Annotated[int, Ge(1)] = 3
    """Measurements of each side; the sides take turns in being first."""
    out: str = "benchmark_evaluate"
    """Folder for adapters, samples and figures.json; its former content is replaced."""

    def __post_init__(self) -> None:
        expand_home(self, "out")


def run(config: EvaluationBenchmarkConfig) -> dict[str, Any]:
    """Measure, print the table, write figures.json."""
    wrong = [name for name in ("adapters", "limit", "max_tokens", "rounds") if getattr(config, name) < 1]
    if wrong:
        raise ValueError("; ".join(f"{name} must be >= 1, got {getattr(config, name)}" for name in wrong))
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    folders = make_adapters(config, out)
    sides: dict[str, list[list[str]]] = {"together": [folders], "in a row": [[], *([folder] for folder in folders)]}
    rounds = []
    for i in range(config.rounds):
        order = list(sides) if i % 2 == 0 else list(reversed(sides))
        rounds.append({side: measured(config, sides[side], out / f"round-{i}" / side) for side in order})
    samples = differing(out / "round-0", list(sides))
    figures: dict[str, Any] = {"config": asdict(config), "rounds": rounds, "samples": samples}
    for name in ("seconds", "seconds_sampling"):
        figures[f"ratio_{name}"] = statistics.median(r["in a row"][name] / r["together"][name] for r in rounds)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console = Terminal()
    console.print(table(rounds))
    console.print(
        f"{config.adapters} adapters and the base, {config.limit} problems: together {figures['ratio_seconds']:.2f} "
        f"times faster, {figures['ratio_seconds_sampling']:.2f} times without loading "
        f"(medians of {config.rounds} rounds)\n"
        f"{samples['equal']} of {samples['all']} samples are the same, {samples['verdicts']} have the same verdict\n"
        f"figures  {out / 'figures.json'}"
    )
    return figures


def make_adapters(config: EvaluationBenchmarkConfig, out: Path) -> list[str]:
    policy = Policy.from_config(config.model, "cpu")
    folders = []
    for i in range(config.adapters):
        adapter = policy.bank.add(f"adapter-{i}", rank=1, seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for factors in adapter.factors.values():
                factors.B.copy_(NOISE * torch.randn(factors.B.shape, generator=generator))
        folders.append(str(save_adapter(adapter, out / "adapters" / adapter.name, policy.name)))
    return folders


def measured(config: EvaluationBenchmarkConfig, commands: Sequence[Sequence[str]], out: Path) -> dict[str, float]:
    """Seconds of commands one after the other: of the processes, and of the sampling in them."""
    seconds = sampling = 0.0
    for adapters in commands:
        options = {"--model.name": config.model.name, "--model.dtype": config.model.dtype, "--limit": config.limit}
        options |= {"--max_tokens": config.max_tokens, "--out": out}
        arguments = [str(x) for pair in options.items() for x in pair]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, str(EVALUATE), *arguments, "--adapters", *adapters], check=True, stdout=subprocess.DEVNULL
        )
        seconds += time.perf_counter() - start
        sampling += json.loads((out / "results.json").read_text(encoding="utf-8"))["seconds"]
    return {"seconds": seconds, "seconds_sampling": sampling}


def differing(folder: Path, sides: Sequence[str]) -> dict[str, int]:
    """How many samples of two sides are the same text, and how many got the same verdict. Others are ties that other
    batch shapes round the other way."""
    one, other = (
        {key_of(s): s for name in ("samples", "earlier") for s in read_sample_file(folder / side / f"{name}.jsonl")}
        for side in sides
    )
    assert one.keys() == other.keys()
    return {
        "all": len(one),
        "equal": sum(one[key]["completions"] == other[key]["completions"] for key in one),
        "verdicts": sum(one[key]["success"] == other[key]["success"] for key in one),
    }


def table(rounds: Sequence[dict[str, dict[str, float]]]) -> Table:
    result = Table(show_edge=False, pad_edge=False)
    for column in ("", "commands", "sampling in them"):
        result.add_column(column, justify="right" if column else "left")
    for side in rounds[0]:
        cells = (statistics.median(r[side][name] for r in rounds) for name in ("seconds", "seconds_sampling"))
        result.add_row(side, *(f"{cell:.1f} s" for cell in cells))
    return result


def main() -> None:
    command(EvaluationBenchmarkConfig, run)


if __name__ == "__main__":
    main()
