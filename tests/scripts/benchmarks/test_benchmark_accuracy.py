"""The comparison of log-probabilities with float32, on a tiny model: it measures rounding, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_lora.config import ModelConfig
from rl_lora.scripts.benchmarks.benchmark_accuracy import AccuracyConfig, run
from rl_lora.system.dtype import Dtype
from tests.tiny import tiny_folder


@pytest.mark.parametrize(("dtype", "bounds"), [("float32", (0.0, 1e-5)), ("bfloat16", (1e-4, 0.1))])
def test_all_sides_differ_from_float32_by_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: Dtype, bounds: tuple[float, float]
) -> None:
    model = ModelConfig(name=str(tiny_folder(tmp_path, "llama")), dtype=dtype)
    figures = run(AccuracyConfig(model=model, rollout="3x2x4", rank=2))
    assert set(figures) == {
        "sampler_learner_kl",
        *(
            f"{side}, {figure}"
            for side in ("rl_lora, sampler", "rl_lora, learner", "transformers")
            for figure in ("mean", "largest")
        ),
    }
    least, most = bounds
    assert all(least <= figure <= most for figure in figures.values()), figures
    assert f"3x2x4, 24 tokens: {dtype} beside float32" in capsys.readouterr().out


def test_a_single_completion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 completions"):
        run(AccuracyConfig(rollout="8x1x4"))
