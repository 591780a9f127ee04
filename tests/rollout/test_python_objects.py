"""`rl_lora.train(config, reward=f, data=rows)`: what a script hands over, and how such a run is known again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rl_lora
from rl_lora.config import EnvConfig, EvalConfig, EvaluateConfig, ModelConfig, RolloutConfig, TrainConfig
from rl_lora.metrics.records import MetricsFile
from tests import ROOT
from tests.tiny import tiny_folder

ROWS = [{"prompt": f"{i}?", "answer": chr(97 + i), "level": i} for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def tiny(model: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "run_dir": str(run_dir),
            "steps": 2,
            "model": ModelConfig(name=str(model), dtype="float32"),
            "rollout": RolloutConfig(prompts_per_step=2, group_size=3, max_tokens=4),
            "eval": EvalConfig(episodes=2, every=0),
            **changes,
        }
    )


def length(completion: str, level: int) -> float:
    return float(len(completion) + level)


def records(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("seconds/", "rollout_tokens_per", "learn_tokens_per")
    found = MetricsFile(run_dir / "metrics.jsonl").read()
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in found]


def test_a_function_and_rows_are_trained_on_and_the_run_is_the_same_from_a_file(model: Path, tmp_path: Path) -> None:
    run_dir = rl_lora.train(tiny(model, tmp_path / "rows"), reward=length, data=ROWS)
    written = yaml.safe_load((run_dir / "config.yaml").read_text())["env"]
    assert written["id"] == "rl_lora/Prompts-v0"
    assert written["kwargs"] == {
        "reward": "given in Python: the reward tests.rollout.test_python_objects.length",
        "path": "given in Python: 20 rows of path",
    }
    sources = {"generator": (row for row in ROWS), "tuple": tuple(ROWS)}
    for name, data in sources.items():
        rl_lora.train(tiny(model, tmp_path / name), reward={"length": 0.0, "own": length}, data=data)
        assert len(records(tmp_path / name)) == len(records(run_dir))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{__import__('json').dumps(row)}\n" for row in ROWS))
    rl_lora.train(tiny(model, tmp_path / "file"), reward="tests.rollout.test_python_objects:length", data=file)
    assert records(tmp_path / "file") == records(run_dir)


def test_a_reward_alone_goes_to_the_environment_of_the_config(model: Path, tmp_path: Path) -> None:
    config = tiny(model, tmp_path / "run", env=EnvConfig(kwargs={"digits": 1}))
    rl_lora.train(config, reward=lambda completion: float(len(completion)))
    assert config.env.kwargs == {"digits": 1}
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["env"]
    assert written["id"] == "rl_lora/Arithmetic-v0"
    assert written["kwargs"]["digits"] == 1


def test_a_resumed_run_takes_the_same_again_and_refuses_anything_else(model: Path, tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        return tiny(model, tmp_path / "run", steps=steps, resume=steps > 2)

    rl_lora.train(config(2), reward=lambda completion, level: float(level), data=ROWS)
    with pytest.raises(ValueError, match="the source of the reward function has changed"):
        rl_lora.train(config(3), reward=lambda completion, level: float(level + 1), data=ROWS)
    changed = [{**row, "level": 0} for row in ROWS]
    with pytest.raises(ValueError, match="problems ask something else"):
        rl_lora.train(config(3), reward=lambda completion, level: float(level), data=changed)
    with pytest.raises(ValueError, match=r"given in Python: 20 rows of path.* -> .*given in Python: 19 rows"):
        rl_lora.train(config(3), reward=lambda completion, level: float(level), data=ROWS[:19])
    rl_lora.train(config(3), reward=lambda completion, level: float(level), data=list(map(dict, ROWS)))
    assert [record["step"] for record in records(tmp_path / "run") if record["kind"] == "train"] == [1, 2, 3]


def test_adapters_are_evaluated_on_what_was_given_and_nowhere_without_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = rl_lora.train(tiny(model, tmp_path / "run"), reward=length, data=ROWS, eval_data=ROWS[:5])
    assert "rl_lora.evaluate(rl_lora.EvaluateConfig(" in capsys.readouterr().out.replace("\n", "")
    config = EvaluateConfig(
        adapters=[str(run_dir)], model=ModelConfig(str(model), "float32"), out=str(tmp_path / "out"), limit=None
    )
    results = rl_lora.evaluate(config, reward=length, data=ROWS, eval_data=ROWS[:5])
    assert [row["n_problems"] for row in results["rows"]] == [5, 5]
    env = yaml.safe_load((run_dir / "config.yaml").read_text())["env"]
    code = f"import rl_lora; rl_lora.train(rl_lora.TrainConfig(env=rl_lora.config.EnvConfig(**{env!r}), run_dir='x'))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "pass it again, as in rl_lora.train(config, reward=...)" in elsewhere.stderr


def test_what_cannot_be_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = tiny(tmp_path / "no model", tmp_path / "run")
    with pytest.raises(ValueError, match=r"'levle'.*there are 'answer', 'level', 'prompt'"):
        rl_lora.train(config, reward=lambda completion, reference, levle: 0.0, data=ROWS)
    with pytest.raises(ValueError, match="row 2: there is no column 'prompt'"):
        rl_lora.train(config, reward=length, data=[*ROWS[:1], {"level": 1, "answer": 2}])
    with pytest.raises(ValueError, match=r"handed to rl_lora\.train"):
        rl_lora.train(tiny(tmp_path / "no", tmp_path / "run", env=EnvConfig(kwargs={"reward": length})))
    with pytest.raises(ValueError, match="data must be a path or rows"):
        rl_lora.train(config, reward=length, data=5)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_run_the_script_that_hands_it_over(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import rl_lora\n"
        "from rl_lora.config import *\n"
        f"config = TrainConfig(run_dir={str(tmp_path / 'run')!r}, model=ModelConfig({str(model)!r}, 'float32'),\n"
        "    steps=2, rollout=RolloutConfig(prompts_per_step=2, group_size=3, max_tokens=4),\n"
        "    eval=EvalConfig(episodes=2))\n"
        "rows = [{'prompt': f'{i}?', 'answer': i} for i in range(20)]\n"
        "rl_lora.train(config, reward=lambda completion, answer: float(len(completion) + answer), data=rows)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter").is_dir()
