"""The two commands that prove the evaluation, on a tiny model: they run, and both sides say the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import rl_lora.scripts.benchmarks.benchmark_evaluate
import rl_lora.scripts.benchmarks.compare_lm_eval
from rl_lora import Policy, save_adapter
from rl_lora.config import ModelConfig
from rl_lora.scripts.benchmarks.benchmark_evaluate import EvaluationBenchmarkConfig
from rl_lora.scripts.benchmarks.compare_lm_eval import CompareConfig
from tests.tiny import randomize, tiny_folder

LM_EVAL = Path(os.environ.get("LM_EVAL_PYTHON", ".venv-lm-eval/bin/python")).absolute()


@pytest.mark.slow
def test_together_and_in_a_row_draw_the_same_samples(tmp_path: Path) -> None:
    model = ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype="float32")
    figures = rl_lora.scripts.benchmarks.benchmark_evaluate.run(
        EvaluationBenchmarkConfig(model=model, adapters=2, limit=6, max_tokens=4, rounds=2, out=str(tmp_path / "out"))
    )
    assert figures["samples"] == {"all": 18, "equal": 18, "verdicts": 18}
    assert figures["ratio_seconds"] > 1  # three commands against one
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL.exists(), reason=f"lm-eval is not installed in {LM_EVAL} (make lm-eval)")
def test_lm_evaluation_harness_gives_the_same_replies_and_verdicts(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    policy = Policy.load(str(folder), dtype="float32")
    save_adapter(randomize(policy.bank.add("a", rank=2), 0), tmp_path / "a", policy.name)
    rows = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(30)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = rl_lora.scripts.benchmarks.compare_lm_eval.run(
        CompareConfig(
            adapter=str(tmp_path / "a"),
            path=str(tmp_path / "problems.jsonl"),
            model=ModelConfig(name=str(folder), dtype="float32"),
            max_tokens=8,
            lm_eval_python=str(LM_EVAL),
            out=str(tmp_path / "out"),
        )
    )
    assert (summary["problems"], summary["same_verdict"]) == (30, 30)
    assert summary["same_reply"] == 30


def test_a_harness_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `make lm-eval`"):
        rl_lora.scripts.benchmarks.compare_lm_eval.run(CompareConfig(lm_eval_python=str(tmp_path / "python")))
