"""The same model, adapter and prompts here and in lm-evaluation-harness: do both give the same verdicts?

`python scripts/benchmarks/compare_lm_eval.py --adapter runs/x/adapter --path gsm8k_test.jsonl`, with the harness in an
environment of its own (`make lm-eval`). Greedy, the task of the harness's gsm8k: its metric, and the last number of the
reply ("flexible-extract"). Every difference is shown, with what each side read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder; also when nothing is installed

import yaml

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EnvConfig, EpisodeConfig, ModelConfig, expand_home
from rl_lora.evaluation.candidates import adapter_in
from rl_lora.lora.peft_io import check_adapter, load_adapter
from rl_lora.metrics.records import Record
from rl_lora.metrics.samples import Sample
from rl_lora.policy.loading import load_tokenizer, resolve_model
from rl_lora.policy.policy import Policy
from rl_lora.rollout.held_out import evaluate_adapters, held_out
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.compiled import should_compile
from rl_lora.sampler.factory import make_sampler
from rl_lora.scripts.command import main as command
from rl_lora.system.terminal import Terminal
from rl_lora.trainer.task import problems_of

TASK = "rl_lora_gsm8k"
FILTER = "flexible-extract"


@dataclass
class CompareConfig:
    """Evaluate an adapter on grade-school problems in rl_lora and in lm-evaluation-harness; compare problem by
    problem."""

    adapter: str = ""
    """Adapter folder (PEFT format) or run folder. By default the bare base is compared."""
    path: str = "gsm8k_test.jsonl"
    """File of problems with the columns question and answer; an answer ends in #### and a number."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(dtype="float32"))
    """The base model. In bfloat16 the two sides round differently, and greedy replies part sooner or later."""
    limit: Annotated[int, Ge(1)] = 200
    """Problems to compare on."""
    max_tokens: Annotated[int, Ge(1)] = 128
    """Limit of one reply in tokens."""
    max_rows: Annotated[int, Ge(1)] = 128
    """Limit of replies that are decoded at the same time in rl_lora."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Replies that are decoded at the same time in lm-evaluation-harness."""
    lm_eval_python: str = ".venv-lm-eval/bin/python"
    """Python interpreter of the environment that holds lm-eval, peft and transformers."""
    out: str = "lm_eval_comparison"
    """Folder for the harness's input and output, and comparison.json."""

    def __post_init__(self) -> None:
        expand_home(self, "adapter", "path", "lm_eval_python", "out")


def run(config: CompareConfig) -> Record:
    """Evaluate on both sides, print what differs, write comparison.json."""
    wrong = [name for name in ("limit", "max_tokens", "max_rows", "batch_size") if getattr(config, name) < 1]
    if wrong:
        raise ValueError("; ".join(f"{name} must be >= 1, got {getattr(config, name)}" for name in wrong))
    if config.adapter:
        check_adapter(adapter_in(Path(config.adapter)))
    if not Path(config.lm_eval_python).exists():
        raise ValueError(f"{config.lm_eval_python} is not there: run `make lm-eval`, or name its interpreter")
    console, out = Terminal(), Path(config.out)
    adapter = str(adapter_in(Path(config.adapter))) if config.adapter else ""
    out.mkdir(parents=True, exist_ok=True)
    samples = evaluated(config, adapter)
    theirs = lm_eval(config, adapter, samples)
    rows = [compared(sample, theirs[sample["observations"][0]]) for sample in samples]
    same = [row for row in rows if row["ours"] == row["theirs"]]
    summary = {
        "problems": len(rows),
        "same_verdict": len(same),
        "same_reply": sum(row["reply"] == row["their_reply"] for row in rows),
        "solved_here": sum(row["ours"] for row in rows),
        "solved_there": sum(row["theirs"] for row in rows),
    }
    console.print(
        f"same verdict on {len(same)} of {len(rows)} problems ({len(same) / len(rows):.1%}), same reply on "
        f"{summary['same_reply']}; solved here {summary['solved_here']}, there {summary['solved_there']}"
    )
    for row in rows:
        if row["ours"] != row["theirs"] or row["reply"] != row["their_reply"]:
            console.print(described(row))
    (out / "comparison.json").write_text(json.dumps(summary | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return summary


def evaluated(config: CompareConfig, adapter: str) -> list[Sample]:
    """What we say of the problems."""
    kwargs = {
        "eval_path": config.path,
        "template": "Question: {question}\nAnswer:",
        "reward": {"math": {"extract": "last_number"}},
    }
    make_env, seeds = held_out(EnvConfig("rl_lora/Math-v0", kwargs), None, config.limit)
    references = {problem.seed: problem.reference for problem in problems_of(make_env, seeds)}
    compiles = should_compile(config.model.compile, "cpu")
    policy = Policy.from_config(config.model, "cpu")
    name = load_adapter(adapter, policy.bank, "compared").name if adapter else None
    limits = EpisodeConfig(max_tokens=config.max_tokens, max_rows=config.max_rows)
    sampler = make_sampler(policy, limits, compile=compiles)
    worker = RolloutWorker(make_env, sampler, policy.chat, limits, context_length=policy.context_length)
    (evaluation,) = evaluate_adapters(worker, seeds, [name])
    worker.close()
    return [sample | {"reference": references[sample["seed"]]} for sample in evaluation.samples()]


def harness_task(data: Path, end: str, max_tokens: int) -> Record:
    """The harness's gsm8k, on the problems of a file: its metric, and the last number of the reply."""
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [end],
            "do_sample": False,
            "max_gen_toks": max_tokens,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "filter_list": [
            {
                "name": FILTER,
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metadata": {"version": 3.0},
    }


def lm_eval(config: CompareConfig, adapter: str, samples: list[Sample]) -> dict[str, Record]:
    """What the harness says of the same prompts, by prompt. Offline: the task, the data and the model are files."""
    out = Path(config.out).resolve()
    data = out / "problems.jsonl"
    problems = [{"question": s["observations"][0], "answer": s["reference"]} for s in samples]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    tokenizer = load_tokenizer(config.model.name, config.model.trust_remote_code)
    task = harness_task(data, tokenizer.eos_token, config.max_tokens)
    (out / f"{TASK}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    model = {"pretrained": Path(resolve_model(config.model.name)), "dtype": config.model.dtype}
    model |= {"peft": Path(adapter).resolve()} if adapter else {}
    arguments = {
        "--model": "hf",
        "--model_args": ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks": TASK,
        "--include_path": out,
        "--output_path": out / "lm_eval",
        "--batch_size": config.batch_size,
        "--device": "cpu",
    }
    called = [str(x) for pair in arguments.items() for x in pair]
    chat = ["--apply_chat_template"] if tokenizer.chat_template is not None else []
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [config.lm_eval_python, "-m", "lm_eval", *called, *chat, "--log_samples"], env=os.environ | offline, check=True
    )
    newest = max((out / "lm_eval").rglob(f"samples_{TASK}_*.jsonl"), key=lambda path: path.stat().st_mtime)
    return {
        record["doc"]["question"]: record for record in map(json.loads, newest.read_text(encoding="utf-8").splitlines())
    }


def compared(sample: Sample, record: dict[str, Any]) -> Record:
    """One problem on both sides."""
    return {
        "prompt": sample["observations"][0],
        "reference": sample["reference"],
        "reply": sample["completions"][0],
        "their_reply": record["resps"][0][0],
        "answer": sample["answer"],
        "their_answer": record["filtered_resps"][0],
        "ours": bool(sample["success"]),
        "theirs": bool(record["exact_match"]),
    }


def described(row: Record) -> str:
    """Why two verdicts differ, or could have."""
    verdict = "same verdict" if row["ours"] == row["theirs"] else "OTHER VERDICT"
    if row["reply"] != row["their_reply"]:
        pairs = zip(row["reply"], row["their_reply"], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row["reply"]), len(row["their_reply"])))
        ours, theirs = (row[name][max(0, at - 30) : at + 30] for name in ("reply", "their_reply"))
        return f"{verdict}, other reply from character {at}: {ours!r} here, {theirs!r} there"
    return (
        f"{verdict} on the same reply: read {row['answer']!r} here ({row['ours']}), {row['their_answer']!r} there "
        f"({row['theirs']}); the reply ends in {row['reply'][-60:]!r}"
    )


def main() -> None:
    command(CompareConfig, run)


if __name__ == "__main__":
    main()
