"""What becomes of a run when episodes fail: a row is left out and counted, a broken task stops the run with its place.

Tiny runs from end to end, with environments and reward functions as users write them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EnvConfig, EvaluateConfig, ModelConfig, TrainConfig
from rl_lora.envs import TextEnv
from rl_lora.evaluation.evaluator import evaluate
from rl_lora.metrics.records import MAX_REASON, MAX_REASONS, count_reasons
from rl_lora.policy.policy import Policy
from rl_lora.rollout.contract import TaskError
from rl_lora.rollout.failures import Failures
from rl_lora.trainer.trainer import train
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import metrics, tiny_config

PROMPTS = "rl_lora/Prompts-v0"


class Ends(Exception):
    """The model would be loaded now."""


class Word(TextEnv):
    """Asks for a word; `rows` seeds out of ten are bad, in the way that `bad` says."""

    def __init__(self, bad: str = "", rows: int = 10) -> None:
        super().__init__()
        self.bad, self.rows, self.n = bad, rows, 0

    def start(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.is_bad = seed % 10 < self.rows
        self.n += 1
        if self.bad == "another text":
            return f"Word {random.random()}", {}
        if self.bad == "a text of its own for each copy":
            return f"Word {id(self)}", {}
        if self.bad == "what came before":
            return f"Word {self.n}", {}
        if self.bad == "another reference":
            return f"Word {seed}", {"reference": random.random()}
        if self.bad == "another conversation":
            return f"Word {seed}", {"messages": [{"role": "user", "content": f"Word {random.random()}"}]}
        if self.bad == "reset" and self.is_bad:
            raise LookupError("no row")
        if self.bad == "long" and self.is_bad:
            return "word " * 200, {}
        return f"Word {seed}", {}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        if self.is_bad:
            if self.bad == "raise":
                raise LookupError(f"no word in {action[:3]!r}")
            if self.bad == "exit":
                raise SystemExit(0)
            if self.bad == "unscorable":
                return "", 0.0, True, False, {"unscorable": "the judge answers 503"}
            if self.bad == "nan":
                return "", float("nan"), True, False, {}
        return "", len(action) / 10, True, False, {"is_success": len(action) > 3}


gym.register(id="Word-v0", entry_point="tests.rollout.test_failures:Word")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def run(model: Path, run_dir: Path, bad: str, rows: int = 10, **changes: Any) -> Path:
    return train(word_config(model, run_dir, bad, rows, **changes))


def word_config(model: Path, run_dir: Path, bad: str, rows: int = 10, **changes: Any) -> TrainConfig:
    env = EnvConfig("Word-v0", {"bad": bad, "rows": rows})
    return tiny_config(model, run_dir, env=env, **{"steps": 3, "eval__every": 0, "eval__episodes": 20, **changes})


def prompts(path: Path, rows: list[dict[str, Any]], **kwargs: Any) -> EnvConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EnvConfig(PROMPTS, {"path": str(path), **kwargs})


def before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> str:
    """What a run says of its task before its model is loaded."""

    def ends(*args: Any, **kwargs: Any) -> None:
        raise Ends

    monkeypatch.setattr(Policy, "load", ends)
    with pytest.raises(ValueError, match=r"\S") as error:
        train(config)
    return str(error.value)


# ---- one problem a seed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["another text", "a text of its own for each copy", "what came before"])
def test_a_seed_that_is_another_problem_each_time_stops_the_run_with_both_texts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    said = before_the_model_is_loaded(monkeypatch, word_config(model, tmp_path, bad))
    assert "Word-v0, seed " in said
    assert "is another problem each time: 'Word " in said
    assert said.count("'Word ") == 2


@pytest.mark.parametrize("bad", ["another reference", "another conversation"])
def test_a_seed_whose_reference_or_conversation_is_another_each_time_stops_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    said = before_the_model_is_loaded(monkeypatch, word_config(model, tmp_path, bad))
    what = {"another reference": "the reference", "another conversation": "the messages"}[bad]
    assert f"is another problem each time: {what} " in said


# ---- before the model is loaded ---------------------------------------------------------------------------------


def test_every_row_is_checked_with_the_rewards_own_rule_and_named_by_file_and_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i} for i in range(60)]
    rows[41]["answer"] = None
    env = prompts(tmp_path / "rows.jsonl", rows)
    said = before_the_model_is_loaded(monkeypatch, tiny_config(model, tmp_path / "run", env=env))
    assert f"{tmp_path / 'rows.jsonl'}, line 42: " in said
    assert "one number as reference" in said
    assert "got None" in said
    for reward in ({"numeric": 1.0, "length": 0.1}, {"numeric": {"strict": True}}, "math"):
        env.kwargs["reward"] = reward
        assert "line 42: " in before_the_model_is_loaded(monkeypatch, tiny_config(model, tmp_path / "run", env=env))


def test_faulty_rows_are_all_counted_and_the_first_ones_listed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": [i] if i % 7 == 0 else i} for i in range(60)]
    env = prompts(tmp_path / "rows.jsonl", rows, eval_fraction=0.0, eval_path=str(tmp_path / "rows.jsonl"))
    said = before_the_model_is_loaded(monkeypatch, tiny_config(model, tmp_path / "run", env=env))
    assert "9 of 60 problems cannot be played:" in said
    assert said.count("rows.jsonl, line ") == 5
    assert "and 4 more" in said


def test_held_out_rows_are_checked_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "held.jsonl"
    prompts(held, [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "two or 3"}, {"prompt": "c", "answer": "x"}])
    env = prompts(tmp_path / "rows.jsonl", [{"prompt": "What?", "answer": 1}], eval_path=str(held))
    said = before_the_model_is_loaded(monkeypatch, tiny_config(model, tmp_path / "run", env=env))
    assert f"{held}, line 3: " in said


def test_a_prompt_that_does_not_fit_is_found_wherever_it_stands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Number {i}?" + "y" * 2000 * (i == 2555), "answer": i} for i in range(2600)]
    env = prompts(tmp_path / "rows.jsonl", rows, eval_fraction=0.0, eval_path=str(tmp_path / "rows.jsonl"))
    said = before_the_model_is_loaded(monkeypatch, tiny_config(model, tmp_path / "run", env=env, eval__episodes=0))
    assert f"{tmp_path / 'rows.jsonl'}, line 2556: " in said
    assert "tokens, but the model's context of 512 leaves 506" in said


def test_demonstrations_need_no_reference_that_can_be_judged(model: Path, tmp_path: Path) -> None:
    env = prompts(tmp_path / "rows.jsonl", [{"prompt": "Say a.", "answer": "a"}] * 4, demonstration="{answer}")
    changes: dict[str, Any] = {"learner__objective": "likelihood", "rollout__group_size": 1, "eval__episodes": 0}
    train(tiny_config(model, tmp_path / "run", env=env, steps=1, **changes))


# ---- while it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["raise", "nan", "long", "reset"])
def test_a_row_that_fails_costs_its_episodes_and_is_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    run_dir = run(model, tmp_path / "run", bad, rows=1)
    said = capsys.readouterr().out
    records = metrics(run_dir, "train")
    failed = [record for record in records if record["unscorable"]]
    assert [record["unscorable"] for record in failed] == [0.25, 0.25]  # seeds 0 and 10 of 0 to 11
    reasons = [reason for record in failed for reason in record["unscorable_reasons"]]
    assert [sum(record["unscorable_reasons"].values()) for record in failed] == [3, 3]
    what = {
        "raise": "raised LookupError: no word",
        "nan": "must be a finite number, got nan",
        "long": "not fit",
        "reset": "reset() raised LookupError",
    }[bad]
    assert all(what in reason for reason in reasons)
    assert all(record["reward"] is not None for record in records)
    assert "left out: " in said
    assert "Word-v0, seed 0" in said
    assert "could not be scored: " in said


@pytest.mark.parametrize(("rows", "share", "prompts"), [(5, 0.4, 20), (1, 0.0, 4), (10, 0.1, 2), (10, 1.0, 1)])
def test_more_failures_than_the_user_allows_stop_the_run_with_the_place(
    model: Path, tmp_path: Path, rows: int, share: float, prompts: int
) -> None:
    changes = {"rollout__max_failed": share, "rollout__prompts_per_step": prompts, "rollout__group_size": 4}
    with pytest.raises(TaskError) as error:
        run(model, tmp_path, "raise", rows, eval__episodes=0, **changes)
    said = str(error.value)
    assert "Word-v0, seed " in said
    assert "step() raised LookupError: no word in" in said
    assert "test_failures.py, line " in said
    assert 'raise LookupError(f"no word' in said


def test_a_larger_share_may_fail_where_the_user_says_so(model: Path, tmp_path: Path) -> None:
    changes = {"rollout__max_failed": 0.6, "rollout__prompts_per_step": 20, "rollout__group_size": 4}
    records = metrics(run(model, tmp_path, "raise", rows=5, steps=2, eval__episodes=0, **changes), "train")
    assert [record["unscorable"] for record in records] == [0.5, 0.5]


def test_what_breaks_in_the_middle_of_a_long_run_stops_it_soon() -> None:
    failures = Failures(0.1)
    for _ in range(1000):
        failures.begin([8] * 16)
        failures.end()
    n = 0
    with pytest.raises(TaskError, match="503"):  # noqa: PT012
        while True:
            failures.begin([8] * 16)
            for _ in range(8 * 16):
                n += 1
                failures.add(TaskError("503", "503"))
            failures.end()
    assert n <= 2 * 8 * 16


def test_a_task_that_exits_is_an_error_whatever_share_may_fail(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Word-v0, seed 0: step\(\) raised SystemExit: 0"):
        run(model, tmp_path / "run", "exit", rows=1, rollout__max_failed=1.0, eval__episodes=0)


@pytest.mark.parametrize("name", ["late", "exits", "keyed"])
def test_whatever_a_reward_function_raises_is_an_error_with_its_place(model: Path, tmp_path: Path, name: str) -> None:
    config = tiny_config(model, tmp_path, steps=1)
    config.env.kwargs["reward"] = f"tests.tiny_reward:{name}"
    with pytest.raises(TaskError, match=rf"(?s)tiny_reward.py\", line .*rl_lora/Arithmetic-v0, seed .*in {name}\)"):
        train(config)


def test_an_evaluation_leaves_failed_episodes_out_and_says_why(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        model=ModelConfig(name=str(model), dtype="float32"),
        env=EnvConfig("Word-v0", {"bad": "raise", "rows": 1}),
        limit=20,
        out=str(tmp_path / "out"),
    )
    (row,) = evaluate(config)["rows"]
    assert row["unscorable"] == 0.1
    assert sum(row["unscorable_reasons"].values()) == 2
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["seed"] % 10 for sample in samples if sample["unscorable"]] == [0, 0]
    assert all(("LookupError" in sample["reason"]) == sample["unscorable"] for sample in samples if sample["reason"])
    config.env, config.out = EnvConfig("Word-v0", {"bad": "raise", "rows": 10}), str(tmp_path / "other")
    with pytest.raises(TaskError, match="raised LookupError"):
        evaluate(config)


def no_json(name: str) -> None:
    pytest.fail(f"{name} is no JSON")


# ---- reasons ----------------------------------------------------------------------------------------------------


def test_the_reasons_of_unscorable_episodes_are_counted_and_nothing_is_best_where_nothing_was_scored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run(model, tmp_path / "run", "unscorable", eval__every=1, eval__episodes=4)
    said = capsys.readouterr().out
    assert "nothing could be scored: 36 x the judge answers 503" in said
    assert "best held out" not in said
    for record in metrics(run_dir):
        assert list(record["unscorable_reasons"]) == ["the judge answers 503"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["best_score"] is None
    assert summary["unscorable"] == {"the judge answers 503": 36}
    for path in (run_dir / "evals").iterdir():
        assert all(json.loads(line)["reason"] == "the judge answers 503" for line in path.read_text().splitlines())
    for path in (*run_dir.rglob("*.json"), *run_dir.rglob("*.jsonl")):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=no_json)


def test_records_hold_a_bounded_number_of_reasons() -> None:
    counts = count_reasons([f"raised ValueError: {i}" for i in range(100)] + ["a"] * 5 + ["b" * 10_000])
    assert counts["a"] == 5
    assert sum(counts.values()) == 106
    assert len(counts) == MAX_REASONS + 1
    assert max(map(len, counts)) <= MAX_REASON
