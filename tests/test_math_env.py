"""Mathematics problems from files: columns, sides, templates, what is refused. Real data where it is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401
from envs.math import PRESETS, MathEnv, normalized

DATA = Path(os.environ.get("RL_LORA_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {i} and 2?", "equation": f"{i} + 2", "answer": float(i + 2), "level": i % 3}
        for i in range(start, start + n)
    ]


def problems(env: MathEnv) -> set[str]:
    return {problem.question for problem in env.problems}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_becomes_problems_that_a_verifier_judges(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix}", rows(30))
    template = "{question} (level {level})"
    make = {"path": path, "template": template, "demonstration": "{equation} = {answer}", "eval_fraction": 0.3}
    env = gym.make("rl_lora/Math-v0", disable_env_checker=True, **make)  # type: ignore[arg-type]
    check_env(env.unwrapped, skip_render_check=True)
    train, held_out = MathEnv(**make), MathEnv(**make, split="eval")  # type: ignore[arg-type]
    assert train.n_problems + held_out.n_problems == 30
    assert not problems(train) & problems(held_out)
    seen = set()
    for seed in range(train.n_problems):
        observation, info = train.reset(seed=seed)
        seen.add(observation)
        number = int(observation.split()[2])
        assert observation == f"What is {number} and 2? (level {number % 3})"
        assert info["demonstration"] == f"{number} + 2 = {number + 2}"
        *_, outcome = train.step(f"so \\boxed{{{number + 2}}}")
        assert outcome["is_success"] is True
        train.reset(seed=seed)
        *_, outcome = train.step(f"The answer is {number + 3}.")
        assert outcome["is_success"] is False
    assert seen == problems(train)


def test_columns_go_by_their_usual_names_in_any_case(tmp_path: Path) -> None:
    for question, answer in (("problem", "solution"), ("Question", "Answer"), ("question_concat", "Answer")):
        path = write(tmp_path / f"{question}.jsonl", [{question: f"{i}?", answer: f"\\boxed{{{i}}}"} for i in range(3)])
        env = MathEnv(path=path, eval_fraction=0)
        assert {p.reference for p in env.problems} == {f"\\boxed{{{i}}}" for i in range(3)}
    path = write(tmp_path / "own.jsonl", [{"text": "1?", "n": 1}])
    assert MathEnv(path=path, question_column="text", answer_column="n", eval_fraction=0).n_problems == 1
    with pytest.raises(ValueError, match=r"question column .* is not there; there are 'text', 'n'"):
        MathEnv(path=path)
    with pytest.raises(ValueError, match=r"its answer column \('m'\) is not there"):
        MathEnv(path=path, question_column="text", answer_column="m")


def test_training_problems_that_are_evaluated_are_refused_with_their_number(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", rows(10)), rows(4, start=8)
    held_out[0]["question"] = "  WHAT is 8, and 2 "
    path = write(tmp_path / "b.jsonl", held_out)
    with pytest.raises(ValueError, match=r"^2 training problems are among those of evaluation"):
        MathEnv(path=train, eval_path=path)
    both = MathEnv(path=train, eval_path=path, allow_overlap=True)
    assert both.n_problems == 10
    assert MathEnv(path=train, eval_path=path, allow_overlap=True, split="eval").n_problems == 4
    assert normalized("A  b, C!") == normalized("a b c")


def test_copies_of_a_question_stay_on_one_side(tmp_path: Path) -> None:
    copies = [{**row, "question": row["question"].upper()} for row in rows(40)]
    path = write(tmp_path / "p.jsonl", rows(40) + copies)
    sides = [MathEnv(path=path, split=split, eval_fraction=0.5, template="{question}") for split in ("train", "eval")]
    first, second = ({normalized(q) for q in problems(env)} for env in sides)
    assert first
    assert second
    assert not first & second


def test_solved_problems_stand_before_the_question_and_are_not_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", rows(5))
    held_out = write(tmp_path / "b.jsonl", rows(2, start=10))
    make: dict[str, Any] = {"path": train, "eval_path": held_out, "template": "Q: {question}", "few_shot": 2}
    make["demonstration"] = "A: {answer}"
    before = "Q: What is 0 and 2?\nA: 2\n\nQ: What is 1 and 2?\nA: 3\n\n"
    assert problems(MathEnv(**make)) == {f"{before}Q: What is {i} and 2?" for i in (2, 3, 4)}
    assert problems(MathEnv(**make, split="eval")) == {f"{before}Q: What is {i} and 2?" for i in (10, 11)}
    assert problems(MathEnv(**make, limit=1)) == {f"{before}Q: What is 2 and 2?"}
    with pytest.raises(ValueError, match="few_shot=9 needs as many training problems; there are 5"):
        MathEnv(**{**make, "few_shot": 9})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "name a dataset"),
        ({"dataset": "gsm9k"}, "dataset must be one of gsm8k, math"),
        ({"path": "nowhere.jsonl"}, "cannot read"),
        ({"path": "FILE", "template": "{answer}?"}, "would show the answer|must name a column"),
        ({"path": "FILE", "template": "{question} {answer}"}, "template would show the answer: it names answer"),
        ({"path": "FILE", "template": "nothing"}, "template must name a column"),
        ({"path": "FILE", "demonstration": "x"}, "demonstration must name a column"),
        ({"path": "FILE", "few_shot": 1}, "few_shot needs a demonstration"),
        ({"path": "FILE", "few_shot": -1}, "few_shot must be >= 0"),
        ({"path": "FILE", "limit": 0}, "limit >= 1"),
        ({"path": "FILE", "eval_fraction": 2}, "eval_fraction must be between 0 and 1"),
        ({"path": "FILE", "split": "test"}, "split must be 'train' or 'eval'"),
        ({"path": "FILE", "eval_fraction": 0, "split": "eval"}, "there are no problems for split 'eval'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "p.jsonl", rows(3))
    given: dict[str, Any] = {name: file if value == "FILE" else value for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        MathEnv(**given)


def test_an_empty_answer_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [*rows(2), {"question": "?", "answer": " "}])
    with pytest.raises(ValueError, match=r"p.jsonl, row 3: 'answer' is empty"):
        MathEnv(path=path)


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_real_data_fits_its_preset(name: str) -> None:
    files = [DATA / f"{name}_{side}.jsonl" for side in ("train", "test")]
    if not all(file.exists() for file in files):
        pytest.skip(f"{files[0]} and {files[1].name} are not there (RL_LORA_DATA names another folder)")
    env = MathEnv(name, str(files[0]), str(files[1]))
    assert PRESETS[name].demonstration
    for seed in range(40):
        env.reset(seed=seed)
        solution = env.problem(seed).demonstration
        assert solution is not None
        assert "<<" not in solution
        *_, info = env.step(solution)
        assert info["is_success"] is True, (solution, env.problem(seed).reference)
