"""Mathematics problems from files: columns, sides, templates, what is refused. Real data where it is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import rl_lora.envs  # noqa: F401
from rl_lora.envs.math import PRESETS, MathEnv, normalized
from tests import ROOT

DATA = Path(os.environ.get("RL_LORA_DATA", ROOT.parent / "shared" / "data"))


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
    both = MathEnv(path=train, eval_path=path, overlap="allow")
    assert both.n_problems == 10
    assert MathEnv(path=train, eval_path=path, overlap="allow", split="eval").n_problems == 4
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


def test_training_problems_that_are_evaluated_can_be_dropped(tmp_path: Path) -> None:
    make: dict[str, Any] = {"path": write(tmp_path / "a.jsonl", rows(10))}
    make["eval_path"] = write(tmp_path / "b.jsonl", rows(4, start=8))
    train, held_out = (MathEnv(**make, overlap="drop", split=split) for split in ("train", "eval"))
    assert (train.n_problems, held_out.n_problems) == (8, 4)
    assert not problems(train) & problems(held_out)


def test_punctuation_makes_no_other_problem_but_a_sign_does() -> None:
    assert normalized("Sam has 3 cats , 2 dogs .") == normalized("sam has 3 cats, 2 dogs")
    assert normalized(r"What is $\frac{1}{2}$?") == normalized(r"What is \frac{1}{2}")
    for one, other in (("2 + 3", "2 - 3"), ("x^2", "x 2"), ("a < b", "a > b"), ("{1}{2}", "{12}")):
        assert normalized(one) != normalized(other)


def test_svamps_question_is_the_whole_problem_not_its_last_sentence(tmp_path: Path) -> None:
    row = {
        "ID": "chal-1",
        "Body": "There are 8 apples in 2 bags",
        "Question": "How many are in each bag?",
        "Equation": "( 8.0 / 2.0 )",
        "Answer": "4",
        "question_concat": "There are 8 apples in 2 bags How many are in each bag?",
    }
    path = write(tmp_path / "svamp.jsonl", [row])
    (problem,) = MathEnv("svamp", path, eval_fraction=0, template="{question}").problems
    assert problem == (row["question_concat"], "4", "( 8 / 2 ) = 4")


def test_data_sets_can_be_mixed(tmp_path: Path) -> None:
    svamp = [write(tmp_path / f"s{i}.jsonl", rows(4, start=10 * i)) for i in (1, 2)]
    plain = [{"question": f"Plain {i}?", "result": str(i)} for i in range(5)]
    mawps = [write(tmp_path / "m1.jsonl", plain[:3]), write(tmp_path / "m2.jsonl", plain[3:])]
    make: dict[str, Any] = {"dataset": ["svamp", "mawps"], "path": [svamp[0], mawps[0]], "template": "{question}"}
    both = MathEnv(**make, eval_path=[svamp[1], mawps[1]])
    assert problems(both) == {f"What is {i} and 2?" for i in range(10, 14)} | {f"Plain {i}?" for i in range(3)}
    shown = {problem.question: problem.demonstration for problem in both.problems}
    assert (shown["What is 11 and 2?"], shown["Plain 2?"]) == ("11 + 2 = 13", "2")
    held_out = MathEnv(**make, eval_path=[svamp[1], mawps[1]], split="eval")
    assert problems(held_out) == {f"What is {i} and 2?" for i in range(20, 24)} | {"Plain 3?", "Plain 4?"}
    assert MathEnv(path=[svamp[0], mawps[0]], eval_fraction=0).n_problems == 7
    assert MathEnv("svamp", [svamp[0], svamp[1]], eval_fraction=0).n_problems == 8
    sides = [MathEnv(**make, eval_fraction=0.5, split=split) for split in ("train", "eval")]
    assert sum(env.n_problems for env in sides) == 7
    with pytest.raises(ValueError, match="a path for each dataset, or none, got 2 datasets and 1 paths"):
        MathEnv(**{**make, "path": mawps[0]})


def test_a_presets_demonstration_may_be_missing_but_not_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"question": "1?", "answer": 1}])
    assert [p.demonstration for p in MathEnv("math", path, eval_fraction=0).problems] == [None]  # no {solution} there
    with pytest.raises(ValueError, match="demonstration must name a column"):
        MathEnv("math", path, eval_fraction=0, demonstration="{solution}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "saved with splits"])
def test_a_folder_is_read_by_datasets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    if kind in ("jsonl", "parquet"):
        for split, start in (("train", 0), ("test", 10)):
            write(folder / f"{split}.{kind}", rows(6, start))
    elif kind == "saved":
        datasets.Dataset.from_list(rows(6)).save_to_disk(folder)
    else:
        sides = {"train": datasets.Dataset.from_list(rows(6)), "test": datasets.Dataset.from_list(rows(6, 10))}
        datasets.DatasetDict(sides).save_to_disk(folder)
    env = MathEnv(path=str(folder), eval_fraction=0, template="{question}")
    assert problems(env) == {f"What is {i} and 2?" for i in range(6)}
    env.reset(seed=0)
    assert env.step(f"\\boxed{{{env.problem(0).reference}}}")[-1]["is_success"] is True
    if kind != "saved":
        held_out = MathEnv(path=str(folder), eval_path=str(folder), template="{question}", split="eval")
        assert problems(held_out) == {f"What is {i} and 2?" for i in range(10, 16)}


def test_rows_of_a_data_set_without_question_or_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    holes = [{"question": " ", "answer": 1}, {"question": "?", "answer": None}]
    datasets.Dataset.from_list([*holes, {"question": "0?", "answer": 0}]).save_to_disk(tmp_path)
    with pytest.warns(UserWarning, match="2 rows without question or answer left out"):
        env = MathEnv(path=str(tmp_path), eval_fraction=0, template="{question}")
    assert problems(env) == {"0?"}


def test_a_data_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot read split 'train' of the data set nobody/nothing: .* local file"):
        MathEnv(path="nobody/nothing")


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
        ({"path": "FILE", "overlap": "keep"}, "overlap must be one of refuse, drop, allow, got 'keep'"),
        ({"path": ["FILE", 3]}, "datasets and paths are texts"),
        ({"path": "FILE", "few_shot": 1}, "few_shot needs a demonstration"),
        ({"path": "FILE", "few_shot": -1}, "few_shot must be >= 0"),
        ({"path": "FILE", "few_shot": 1.0}, "few_shot must be a whole number, got 1.0"),
        ({"path": "FILE", "few_shot": None}, "few_shot must be a whole number, got None"),
        ({"path": "FILE", "limit": "3"}, "limit must be a whole number, got '3'"),
        ({"path": "FILE", "limit": True}, "limit must be a whole number, got True"),
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


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mawps"])
def test_real_data_fits_its_preset(name: str) -> None:
    files = [DATA / f"{name}_{side}.jsonl" for side in ("train", "test")]
    if not all(file.exists() for file in files):
        pytest.skip(f"{files[0]} and {files[1].name} are not there (RL_LORA_DATA names another folder)")
    env = MathEnv(name, str(files[0]), str(files[1]), overlap="drop")
    assert PRESETS[name].demonstration
    for seed in range(40):
        env.reset(seed=seed)
        solution = env.problem(seed).demonstration
        assert solution is not None
        assert "<<" not in solution
        *_, info = env.step(solution)
        assert info["is_success"] is True, (solution, env.problem(seed).reference)
