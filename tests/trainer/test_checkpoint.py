"""A run goes on only as the run that it was, from files that are what was written; what is not is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rl_lora.envs  # noqa: F401  registers the environments
from rl_lora.config import EnvConfig, TrainConfig
from rl_lora.envs import Problem, SingleTurnEnv
from rl_lora.metrics.records import MetricsFile
from rl_lora.system import files
from rl_lora.trainer.checkpoint import Checkpoints
from rl_lora.trainer.task import ProblemRecord, _record, problems_of, task_changes
from rl_lora.trainer.trainer import train
from tests import ROOT
from tests.tiny import tiny_folder, tiny_model
from tests.trainer.test_trainer import adapter_hash, assert_same_run, metrics, tiny_config, trainable_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`two`: a run of two steps with a checkpoint of each; `three`: of three, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("two", 2), ("three", 3)):
        train(short(model, folder / name, steps=steps))
    return folder


def short(model: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    return tiny_config(model, run_dir, checkpoint__every=1, eval__every=1, **changes)


@pytest.fixture
def two(runs: Path, tmp_path: Path) -> Path:
    """A run that came to its second step, to be gone on with."""
    return Path(shutil.copytree(runs / "two", tmp_path / "run"))


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = [
    "state.json",
    "optimizer.pt",
    "random.pt",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
]


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_told_from_a_whole_one(
    name: str, damage: Callable[[Path], None], two: Path
) -> None:
    checkpoints = Checkpoints(two / "checkpoints", 2)
    assert checkpoints.damaged() == []
    damage(two / "checkpoints" / "step-000002" / name)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [1, 2]
    (said,) = checkpoints.damaged()
    assert said.startswith(str(two / "checkpoints" / "step-000002" / name))


@pytest.mark.parametrize(("name", "damage"), [("state.json", empty), ("adapter/adapter_model.safetensors", flip)])
def test_a_run_goes_on_from_the_older_checkpoint_and_says_so(
    name: str,
    damage: Callable[[Path], None],
    two: Path,
    runs: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = two / "checkpoints" / "step-000002" / name
    damage(damaged)
    assert_same_run(train(short(model, two, steps=3, resume=True)), runs / "three")
    said = capsys.readouterr().out
    assert f"{damaged} " in said
    assert "passed over for the newest that is whole" in said
    assert "going on from step 1" in said


def test_without_a_whole_checkpoint_the_error_says_which_files_are_damaged(two: Path, model: Path) -> None:
    flip(two / "checkpoints" / "step-000001" / "optimizer.pt")
    (two / "checkpoints" / "step-000002" / "random.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*optimizer.pt has changed") as error:
        train(short(model, two, steps=3, resume=True))
    assert f"{two / 'checkpoints' / 'step-000002' / 'random.pt'} is missing" in str(error.value)
    assert "from a copy, or start over in another --run_dir" in str(error.value)


def test_the_last_whole_checkpoint_is_not_removed_for_damaged_newer_ones(model: Path, tmp_path: Path) -> None:
    trainable = trainable_adapter(model)
    optimizer = torch.optim.AdamW(trainable.weights)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 6):
        checkpoints.save(step, trainable, optimizer, config={}, score=None)
    for step in (5, 6):
        flip(tmp_path / f"step-00000{step}" / "optimizer.pt")
    shutil.copytree(tmp_path / "step-000005", tmp_path / "step-000001", dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 3):
        checkpoints.save(step, trainable, optimizer, config={}, score=None)
        assert [checkpoint.step for checkpoint in checkpoints.whole()] == [step]


def without_hashes(run_dir: Path) -> None:
    """As it was written before checkpoints had hashes and knew their task."""
    for path in run_dir.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({name: state[name] for name in ("step", "version", "score", "config")}, indent=1))
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["hash"]
    (run_dir / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("name", [None, *FILES])
def test_checkpoints_of_before_there_were_hashes_still_load_and_are_read_for_damage(
    name: str | None, two: Path, runs: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_hashes(two)
    if name is not None:
        cut(two / "checkpoints" / "step-000002" / name)
    assert_same_run(train(short(model, two, steps=3, resume=True)), runs / "three")
    said = capsys.readouterr().out
    assert f"going on from step {2 if name is None else 1}" in said
    assert name is None or str(two / "checkpoints" / "step-000002" / name) in said


def test_half_a_checkpoint_that_an_older_version_left_behind_is_passed_over(two: Path, runs: Path, model: Path) -> None:
    for name in ("state.json", "random.pt"):
        (two / "checkpoints" / "step-000001" / name).unlink()
    (two / "checkpoints" / ".partial-step-000003-0a").mkdir()
    (two / "config.yaml.partial").write_text("steps: 3")
    assert_same_run(train(short(model, two, steps=3, resume=True)), runs / "three")
    assert not list(two.rglob("*partial*"))


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_summary_is_named_and_written_again(
    damage: Callable[[Path], None], two: Path, runs: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(two / "summary.json")
    train(short(model, two, steps=2, resume=True))
    assert str(two / "summary.json") in capsys.readouterr().out
    summary, other = (json.loads((folder / "summary.json").read_text()) for folder in (two, runs / "two"))
    assert {k: v for k, v in summary.items() if k not in ("hash", "seconds", "adapter", "best_checkpoint", "next")} == {
        k: v for k, v in other.items() if k not in ("hash", "seconds", "adapter", "best_checkpoint", "next")
    }


def test_a_damaged_config_is_named_where_it_is_needed_and_written_again_where_not(
    two: Path, runs: Path, model: Path
) -> None:
    empty(two / "config.yaml")
    assert_same_run(train(short(model, two, steps=3, resume=True)), runs / "three")
    assert (two / "config.yaml").read_text().startswith("run_dir:")
    (two / "config.yaml").write_bytes(b"steps: [\xff")
    shutil.rmtree(two / "checkpoints")
    with pytest.raises(ValueError, match=r"config.yaml is damaged .*; remove it"):
        train(short(model, two, steps=4, resume=True))


@pytest.mark.parametrize("line", [0, 1, 2])
def test_no_record_is_lost_behind_a_damaged_line_of_metrics(
    line: int, two: Path, runs: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = b"\xff" + lines[line][1:]
    path.write_bytes(b"".join(lines))
    train(short(model, two, steps=3, resume=True))
    assert f"metrics.jsonl, line {line + 1}: damaged, moved to metrics.damaged.jsonl" in capsys.readouterr().out
    expected = [(record["kind"], record["step"]) for record in metrics(runs / "three")]
    del expected[line]
    assert [(record["kind"], record["step"]) for record in metrics(two)] == expected
    assert len((two / "metrics.damaged.jsonl").read_bytes().splitlines()) == 1


def test_records_whose_lines_end_as_on_windows_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\r\n{"kind": "train", "step": 2}\r\n')
    assert MetricsFile(path).rewind(2) == ""
    assert [record["step"] for record in MetricsFile(path).read()] == [1, 2]


@pytest.mark.parametrize("value", [{}, [], {"config": 5}, {"step": "2"}, {"score": "high"}, {"version": None}])
def test_a_state_of_another_form_is_damage(two: Path, value: Any) -> None:
    checkpoint = Checkpoints(two / "checkpoints", 1).all()[-1]
    known = {name: checkpoint.state[name] for name in ("step", "version", "score", "config")}
    state = checkpoint.folder / "state.json"
    state.write_text(json.dumps({**known, **value} if value else value))
    assert str(state) in (checkpoint.damage() or "")


def test_a_link_that_leads_nowhere_in_a_checkpoint_does_not_end_a_resume(two: Path) -> None:
    checkpoint = Checkpoints(two / "checkpoints", 1).all()[-1]
    (checkpoint.folder / "link").symlink_to("nowhere")
    latest = Checkpoints(two / "checkpoints", 1).latest()
    assert latest is not None
    assert latest.step == checkpoint.step


def test_records_that_share_a_line_are_both_kept_and_a_missing_one_is_said(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        file.append("train", step, {"reward": 0.5})
    text = file.path.read_text()
    file.path.write_text(text.replace("\n", "?", 1)[:-1])  # the end of the first line, and of the last
    assert [record["step"] for record in file.read()] == [1, 2, 3, 4]
    assert "line 1: damaged" in file.rewind(4)
    assert file.path.read_text() == text
    file.path.write_text("".join(text.splitlines(keepends=True)[1:3]))
    assert file.rewind(3).endswith("has no record of step 1")


@pytest.fixture
def own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A finished run of two steps on data and a reward of the user's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_reward.py").write_text("def size(completion, reference): return float(len(completion))\n")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "answer": i}) + "\n" for i in range(40))
    )
    kwargs = {"path": str(tmp_path / "rows.jsonl"), "reward": "my_reward:size", "demonstration": "it is {answer}"}
    config = short(model, tmp_path / "run", steps=2, env=EnvConfig("rl_lora/Prompts-v0", kwargs))
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    train(config)
    return config


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("my_reward.py", "float(len", "-float(len", "the source of the reward function has changed"),
        (
            "rows.jsonl",
            '"answer": 7}',
            '"answer": 8}',
            "1 of 37 training problems ask something else",
        ),
        ("rows.jsonl", '"39?", "answer": 39', '"40?", "answer": 39', "training problems"),
        ("rows.jsonl", '{"prompt": "5?", "answer": 5}\n', "", "there were"),
    ],
)
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_whose_data_or_reward_have_changed_is_neither_resumed_nor_shown_as_the_same(
    steps: int, file: str, old: str, new: str, said: str, own: TrainConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / file
    text = path.read_text()
    path.write_text(text.replace(old, new))
    assert path.read_text() != text
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    before = {path: path.stat().st_mtime_ns for path in Path(own.run_dir).rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match="holds a run of another task, and resuming would mix the two") as error:
        train(dataclasses.replace(own, steps=steps, resume=True))
    assert said in str(error.value)
    assert "choose another --run_dir" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in Path(own.run_dir).rglob("*") if path.name != ".lock"} == before
    path.write_text(text)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    train(dataclasses.replace(own, steps=steps, resume=True))


HELPER = "UNIT = 1.0\n\ndef worth(text): return UNIT * len(text)\n"
ENVIRONMENT = """
import gymnasium as gym
from envs import TextEnv
from my_helper import worth
def judged(action): return worth(action)
class Own(TextEnv):
    def start(self, seed): return f"{seed}?", {}
    def step(self, action): return "", judged(action), True, False, {}
gym.register(id="Own-v0", entry_point=Own, kwargs={})
"""


@pytest.mark.parametrize("kind", ["reward", "environment"])
@pytest.mark.parametrize(
    ("file", "old", "new"), [("my_helper.py", "1.0", "-1.0"), ("my_task.py", "worth(a", "-worth(a")]
)
def test_what_a_task_imports_belongs_to_it(
    kind: str, file: str, old: str, new: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_helper.py").write_text(HELPER)
    reward = "import my_helper\ndef size(completion): return judged(completion)\n" + ENVIRONMENT.partition("class")[0]
    (tmp_path / "my_task.py").write_text(reward if kind == "reward" else ENVIRONMENT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(40)))
    kwargs = {"path": str(tmp_path / "rows.jsonl"), "reward": "my_task:size"}
    env = EnvConfig("rl_lora/Prompts-v0", kwargs) if kind == "reward" else EnvConfig("my_task:Own-v0")

    def fresh() -> None:
        for name in ("my_helper", "my_task"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    fresh()
    config = short(model, tmp_path / "run", steps=1, env=env)
    train(config)
    path = tmp_path / file
    text = path.read_text()
    path.write_text(text.replace(old, new))
    assert path.read_text() != text
    fresh()
    with pytest.raises(ValueError, match=f"the source of the {kind}.* has changed"):
        train(dataclasses.replace(config, steps=2, resume=True))
    path.write_text(text)
    fresh()
    train(dataclasses.replace(config, steps=2, resume=True))


@pytest.mark.parametrize("what", ["weights", "chat template"])
def test_a_run_whose_model_has_changed_in_its_folder_is_not_resumed(what: str, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = short(folder, tmp_path / "run", steps=1)
    train(config)
    if what == "weights":
        tiny_model("llama", seed=1).save_pretrained(folder)
    else:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    with pytest.raises(ValueError, match=f"holds a run of another task, .*: the {what} of the model .* changed"):
        train(dataclasses.replace(config, steps=2, resume=True))


def weighed(completion: str, reference: int, weight: float) -> float:
    return weight


class Rows(SingleTurnEnv):
    """One problem, made of a row of data."""

    def __init__(self, reward: Any, row: dict[str, Any]) -> None:
        super().__init__(reward)
        self.row = row

    def problem(self, seed: int) -> Problem:
        return Problem("?", 1, record=self.row)


def test_a_column_that_the_reward_reads_belongs_to_the_problem_and_others_do_not() -> None:
    def digest(reward: Any, **row: Any) -> str:
        (problem,) = problems_of(lambda: Rows(reward, row), [0])
        return problem.hash

    assert digest(weighed, weight=1.0, note="a") != digest(weighed, weight=2.0, note="a")
    assert digest("numeric", weight=1.0, note="a") == digest("numeric", weight=2.0, note="b")


def test_a_problem_that_cannot_be_asked_at_the_moment_is_no_change_of_the_task() -> None:
    def record(failing: set[int], n: int = 5, changed: int | None = None) -> dict[str, Any]:
        part = _record([ProblemRecord(i, None, f"{i} {i == changed}", failed=i in failing) for i in range(n)])
        return {"environment": "e", "reward": "r", "problems": part, "held_out": part}

    assert task_changes(record({1}), record({2}), "E") == []
    assert len(task_changes(record({1}), record({2}, changed=3), "E")) == 2
    many = record(set(), 10_000)
    assert len(many["problems"]["hashes"]) <= 4096
    assert task_changes(many, record({4}, 10_000), "E") == []
    (first, _) = task_changes(many, record({4}, 10_000, changed=77), "E")
    assert first.startswith("some of 10000 training problems")


def test_a_run_that_never_took_its_task_down_is_resumed_as_before(own: TrainConfig, tmp_path: Path) -> None:
    without_hashes(Path(own.run_dir))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}!", "answer": i}) + "\n" for i in range(50))
    )
    train(dataclasses.replace(own, steps=3, resume=True))
    latest = Checkpoints(Path(own.run_dir) / "checkpoints", 1).latest()
    assert latest is not None
    assert latest.state["task"]["problems"]["n"] > 30  # from here on it is known


def test_one_run_at_a_time_writes_to_a_folder_and_a_dead_one_blocks_nothing(two: Path, runs: Path, model: Path) -> None:
    code = "import sys, time; from pathlib import Path; from rl_lora.system.files import lock\n"
    code += f"held = lock(Path({str(two)!r}), 'a run', ''); print('held', flush=True); time.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"another run is writing to .*; wait until it has ended, or choose"):
            train(short(model, two, steps=3, resume=resume))
    train(short(model, two, steps=2, resume=True))  # only shows what came of it
    other.kill()
    other.communicate()
    assert_same_run(train(short(model, two, steps=3, resume=True)), runs / "three")


def test_options_that_an_older_version_did_not_have_are_at_their_defaults(two: Path, runs: Path, model: Path) -> None:
    without_hashes(two)
    path = two / "checkpoints" / "step-000002" / "state.json"
    state = json.loads(path.read_text())
    for name in ("rollout.max_turns", "learner.max_grad_norm", "checkpoint.keep"):
        del state["config"][name]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"learner.max_grad_norm: 1.0 -> 0.5"):
        train(short(model, two, steps=3, resume=True, learner__max_grad_norm=0.5))
    assert adapter_hash(train(short(model, two, steps=3, resume=True))) == adapter_hash(runs / "three")
    state["config"]["rollout.forgotten"] = 3
    (two / "checkpoints" / "step-000003" / "state.json").write_text(json.dumps(state | {"step": 3, "version": 3}))
    with pytest.raises(ValueError, match=r"rollout.forgotten: 3 -> no such option in this version"):
        train(short(model, two, steps=4, resume=True))


def test_an_adapter_of_a_damaged_checkpoint_is_not_started_from(two: Path, model: Path, tmp_path: Path) -> None:
    adapter = two / "checkpoints" / "step-000002" / "adapter"
    flip(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has changed since it was written"):
        train(short(model, tmp_path / "other", adapter__init_from=str(adapter)))


def test_a_folder_takes_the_place_of_another_and_comes_back_if_it_cannot(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for text in ("old", "new"):
        with files.new_folder(folder) as draft:
            files.write_text(draft / "x", text)
    assert (folder / "x").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]
