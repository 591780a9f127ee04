"""Where the prompts of `rl_lora/Prompts-v0` may come from, and conversations as prompts."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import RolloutConfig
from rl_lora.envs.prompts import PromptsEnv
from rl_lora.policy.chat import Chat
from rl_lora.rollout.demonstrations import Demonstrations
from rl_lora.rollout.problems import check_problems
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "level": "easy" if i < 5 else "hard"} for i in range(10)]
SYSTEM = {"role": "system", "content": "Be brief."}


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "data.jsonl": as_jsonl,
    "data.json": as_json,
    "lines.json": as_jsonl,
    "data.csv": as_csv,
    "data.tsv": lambda path: as_csv(path, "\t"),
    "data.parquet": as_parquet,
    "no_suffix": as_jsonl,
}


def questions(env: PromptsEnv) -> list[tuple[str, str]]:
    return sorted((problem.question, str(problem.reference)) for problem in env.problems)


WHOLE = sorted((str(row["prompt"]), str(row["answer"])) for row in ROWS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    env = PromptsEnv(path, eval_fraction=0.0)
    assert questions(env) == WHOLE
    assert env.problems[3].record is not None
    assert env.problems[3].record["level"] == "easy"
    assert env.problems[3].place.startswith(str(path))


def test_rows_in_python_and_data_sets_are_read_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    as_jsonl(tmp_path / "folder" / "train.jsonl")
    sources = [ROWS, tuple(ROWS), data, (row for row in ROWS), data.to_pandas(), data.data.table]
    for source in [*sources, tmp_path / "saved", str(tmp_path / "folder")]:
        assert questions(PromptsEnv(source, eval_fraction=0.0)) == WHOLE, source
    splits = datasets.DatasetDict(train=data, test=data.select(range(3)))
    splits.save_to_disk(str(tmp_path / "splits"))
    held = PromptsEnv(ROWS, split="eval", eval_path=tmp_path / "splits")
    assert questions(held) == WHOLE[:3]
    with pytest.raises(ValueError, match="keys train, test: choose one"):
        PromptsEnv(splits)


def test_many_copies_share_the_rows_that_python_gave_and_a_longer_list_is_read_again() -> None:
    rows = list(ROWS)
    copies = [gym.make("rl_lora/Prompts-v0", path=rows, eval_fraction=0.0) for _ in range(3)]
    assert len({id(copy.unwrapped.problems) for copy in copies}) == 1  # type: ignore[attr-defined]
    rows.append({"prompt": "new", "answer": 1})
    assert len(PromptsEnv(rows, eval_fraction=0.0).problems) == 11


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[{"prompt": "a", "answer": 1}, 5]', "row 2: expected a JSON object, got a int"),
        ("d.json", b'[{"prompt": "a",\n "answer": }]', r"not JSON \(.* at line 2, column 12\)"),
        ("d.jsonl", b'[{"prompt": "a"}]', r"line 1: expected a JSON object, got a list \(.* is called .json\)"),
        ("d.csv", b"prompt,answer\na,1\nb\n", r"line 3: 1 cell, but 2 columns \(prompt, answer\)"),
        ("d.csv", b'prompt,answer\n"two\nlines",1\nb\n', "line 4: 1 cell"),
        ("d.csv", b"prompt,prompt\na,1\n", "must name each column once"),
        ("d.csv", b'prompt,answer\n"a,1\n', "not CSV"),
        ("d.csv", b"prompt,answer\n", r"is empty.*\.csv"),
        ("d.csv", b"prompt,answer\n\xff,1\n", "not UTF-8"),
        ("d.parquet", b"PAR1", "cannot read .* as Parquet"),
        ("d.jsonl.gz", b"no gzip", "cannot read .*d.jsonl.gz"),
        ("d.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99, mtime=0)[:-9], "cannot read .*d.jsonl.gz"),
        ("d.xlsx", b"PK", r"\.xlsx files are not read here, but \.jsonl, \.json, \.csv, \.tsv, \.parquet, each also"),
        ("d.jsonl.zst", b"(", r"\.zst files are not read here"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PromptsEnv(tmp_path / name, eval_fraction=0.0)


@pytest.mark.parametrize("data", [[], [1], ["a"], [{1: "a"}], 5, {"prompt": ["a"]}])
def test_what_is_no_list_of_rows_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"the data|data must be"):
        PromptsEnv(data)


# ---- columns for reward functions -------------------------------------------------------------------------------


def test_a_reward_function_gets_columns_by_name_and_one_that_is_missing_is_named_with_its_row() -> None:
    def own(completion: str, level: str, record: dict[str, Any], prompt: str) -> float:
        return float(level == "easy" and record["prompt"] in prompt and completion == str(record["answer"]))

    env = PromptsEnv(ROWS, reward=own, eval_fraction=0.0, template="{prompt} Now.")
    observation, info = env.reset(seed=0)
    level = next(row["level"] for row in ROWS if str(row["prompt"]) in observation)
    assert env.step(str(info["reference"]))[1] == float(level == "easy")
    with pytest.raises(ValueError, match=r"'levle'.*no such column; there are 'answer', 'level', 'prompt'"):
        PromptsEnv(ROWS, reward=lambda completion, reference, levle: 0.0)
    holed = [*ROWS, {"prompt": "?", "answer": 1}]
    with pytest.raises(ValueError, match=r"row 11: there is no column 'level'; .*which the reward function asks for"):
        PromptsEnv(holed, reward=own)


def test_an_answer_column_may_be_missing_where_no_function_asks_for_it() -> None:
    rows = [{"prompt": row["prompt"], "solution": str(row["answer"])} for row in ROWS]

    def batch(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    env = PromptsEnv(rows, reward=batch, eval_fraction=0.0)
    problem = env.problem(3)
    env.reset(seed=3)
    assert problem.record is not None
    assert env.step(problem.record["solution"])[1] == 1.0
    with pytest.raises(ValueError, match="no column 'answer'"):
        PromptsEnv(rows)


def test_a_reference_may_stand_inside_a_column() -> None:
    rows = [{"prompt": row["prompt"], "reward_model": {"ground_truth": row["answer"]}} for row in ROWS]
    env = PromptsEnv(rows, reference_column="reward_model.ground_truth", eval_fraction=0.0)
    assert questions(env) == WHOLE
    with pytest.raises(ValueError, match=r"row 1: there is no column .reward_model\.truth."):
        PromptsEnv(rows, reference_column="reward_model.truth")


# ---- conversations ----------------------------------------------------------------------------------------------

CONVERSATIONS = [{"prompt": [SYSTEM, {"role": "user", "content": f"{i} + {i}?"}], "answer": 2 * i} for i in range(4)]


def rendered(env: PromptsEnv, seed: int = 0, **config: Any) -> str:
    shown = Demonstrations(lambda: env, Chat(tiny_tokenizer(True)), RolloutConfig(**config)).collect(
        [seed], adapters=[None]
    )
    return str(tiny_tokenizer(True).decode(list(shown[0].episodes[0].turns[0].prompt_ids)))


def test_messages_are_the_conversation_that_the_chat_template_renders() -> None:
    env = PromptsEnv(CONVERSATIONS, eval_fraction=0.0, demonstration="{answer}", template="{prompt} Reply.")
    observation, info = env.reset(seed=1)
    question = info["messages"][1]["content"]
    assert question.endswith("? Reply.")
    assert info["messages"][0] == SYSTEM
    assert observation == f"[system]\nBe brief.\n\n[user]\n{question}"
    assert rendered(env, 1) == f"<|system|>\nBe brief.<eos>\n<|user|>\n{question}<eos>\n<|assistant|>\n"
    assert CONVERSATIONS[0]["prompt"][1]["content"] == "0 + 0?"  # type: ignore[index]


def test_earlier_turns_parts_and_single_messages_are_conversations_too() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}
    (problem,) = PromptsEnv([{"prompt": [*turns, parts], "answer": 4}], eval_fraction=0.0).problems
    assert problem.messages == [*turns, {"role": "user", "content": "2 + 2?"}]
    one, text = [{"role": "user", "content": "2 + 2?"}], "2 + 2?"
    problems = [PromptsEnv([{"prompt": p, "answer": 4}], eval_fraction=0.0).problems[0] for p in (one, text)]
    assert [problem.question for problem in problems] == [text, text]
    assert [problem.messages for problem in problems] == [one, None]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "must be"),
        ([{"role": "user"}], "must be"),
        ([{"content": "a"}], "must be"),
        (["a"], "must be"),
        ([{"role": "user", "content": ""}], "must be"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "must be"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "last message .* is the assistant's",
        ),
        ({"role": "user", "content": "a"}, "must be a text, got a dict; or messages"),
    ],
)
def test_what_is_no_conversation_to_reply_to_is_refused_with_its_row(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        PromptsEnv([{"prompt": prompt, "answer": 1}], eval_fraction=0.0)


def test_a_second_system_prompt_is_refused_before_a_model_is_there() -> None:
    def check(data: Any) -> None:
        chat = Chat(tiny_tokenizer(True))
        config = RolloutConfig(system_prompt="Think.", max_tokens=4)
        check_problems(lambda: PromptsEnv(data, eval_fraction=0.0), [0], chat, config, 512)

    check(ROWS)
    with pytest.raises(ValueError, match=r"a system message of its own.*'Be brief\.'"):
        check(CONVERSATIONS)


def test_a_model_without_a_chat_template_gets_the_messages_one_after_another() -> None:
    chat = Chat(tiny_tokenizer(False))
    messages = [SYSTEM, {"role": "user", "content": "2?"}]
    assert chat.tokenizer.decode(chat.start("", None, messages)) == "Be brief.\n\n2?"
