"""The promises of `evaluator.py` and `samples.py`: one table whatever the way there, and no sample drawn twice."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import rl_lora.envs  # noqa: F401
from rl_lora import EvaluateConfig, Policy, evaluate, save_adapter
from rl_lora.config import EnvConfig, ModelConfig
from rl_lora.envs.text import SingleTurnEnv
from rl_lora.evaluation.candidates import adapter_folders, is_unfinished, path_notes
from rl_lora.evaluation.sample_store import SampleStore, key_of, read_sample_file
from rl_lora.rollout.worker import EpisodeRequest, RolloutWorker
from rl_lora.scripts.command import parse
from rl_lora.settings.dotted import flatten
from rl_lora.types import Episode
from tests import ROOT
from tests.tiny import randomize, tiny_folder

TIMED = {"seconds", "seconds_loading", "n_drawn", "n_found", "rows_per_pass"}
TASK = {"reward": "tests.tiny_reward:voting", "template": "{a}+{b}", "digits": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, and adapters a, b and c of it; twin is b under another name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder, "llama")
    policy = Policy.load(str(folder / "tiny-llama"), dtype="float32")
    for seed, name in enumerate("abc"):
        save_adapter(randomize(policy.bank.add(name, rank=2, seed=seed), seed), folder / name, policy.name)
    save_adapter(policy.bank["b"], folder / "twin", policy.name)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation of `config` that nothing interrupts leaves behind."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(config_of(models, out))
    return out


@pytest.fixture
def config(models: Path, tmp_path: Path) -> EvaluateConfig:
    return config_of(models, tmp_path / "out")


def config_of(models: Path, out: Path) -> EvaluateConfig:
    return EvaluateConfig(
        adapters=[str(models / name) for name in "ab"],
        model=ModelConfig(name=str(models / "tiny-llama"), dtype="float32"),
        env=EnvConfig(kwargs=dict(TASK)),
        limit=12,
        n=3,
        temperature=1.0,
        max_tokens=4,
        max_rows=8,
        out=str(out),
    )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how often an evaluation was interrupted, or where it was written."""
    kept = {name: value for name, value in results.items() if name not in TIMED}
    return kept | {"config": {k: v for k, v in results["config"].items() if k != "out"}}


def lines(config: EvaluateConfig, name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return read_sample_file(Path(config.out) / name)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[EpisodeRequest]:
    """Takes down everything that is played."""
    played: list[EpisodeRequest] = []
    play = RolloutWorker.play

    def watched(self: RolloutWorker, wanted: Any, **kwargs: Any) -> list[list[Episode]]:
        result = play(self, wanted, **kwargs)
        played.extend(wanted)
        return result

    monkeypatch.setattr(RolloutWorker, "play", watched)
    return played


def n_drawn(drawn: list[EpisodeRequest]) -> int:
    return sum(plays.n for plays in drawn)


def test_results_and_samples_hold_what_a_page_needs(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(config)
    assert results == json.loads((Path(config.out) / "results.json").read_text())
    assert (results["kind"], results["k"]) == ("evaluation", [1, 2, 3])
    assert [row["name"] for row in results["rows"]] == ["base", "a", "b"]
    for row, of_row in zip(results["rows"], results["pairs"], strict=True):
        assert (row["n_problems"], row["n_samples"]) == (12, 36)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["pass"]["1"]["value"] == pytest.approx(row["accuracy"])
        assert row["pass"]["1"]["value"] <= row["pass"]["2"]["value"] <= row["pass"]["3"]["value"]
        assert set(row["majority"]) == {"2", "3"}
        versus = of_row[0]
        assert row["difference"] == (
            versus and {"value": versus["difference"], **{k: versus[k] for k in ("low", "high", "p")}}
        )
    samples = lines(config)
    assert len(samples) == 3 * 36
    assert {(s["adapter"], s["problem"], s["k"]) for s in samples} == {
        (row["name"], problem, k)
        for row in results["rows"]
        for problem in {s["problem"] for s in samples}
        for k in range(3)
    }
    for sample in samples:
        assert {"observations", "completions", "answer", "reward", "reward_parts", "success"} <= sample.keys()
        assert {"truncated", "unscorable", "tokens", "adapter_hash", "sampling_hash", "seed"} <= sample.keys()
        a, b = sample["observations"][0].split("+")
        assert sample["reference"] == int(a) + int(b)
    said = " ".join(capsys.readouterr().out.split())
    assert "the base was loaded once" in said
    assert "rows a forward pass on average, where one adapter alone has 8 at most" in said
    assert 1 < results["rows_per_pass"] <= 8


def test_an_evaluation_again_draws_nothing_and_says_the_same(
    config: EvaluateConfig, drawn: list[EpisodeRequest]
) -> None:
    first = evaluate(config)
    samples = (Path(config.out) / "samples.jsonl").read_bytes()
    assert n_drawn(drawn) == first["n_drawn"] == 108
    again = evaluate(config)
    assert n_drawn(drawn) == 108
    assert (again["n_drawn"], again["n_found"]) == (0, 108)
    assert figures(again) == figures(first)
    assert (Path(config.out) / "samples.jsonl").read_bytes() == samples
    anew = evaluate(dataclasses.replace(config, resume=False))
    assert n_drawn(drawn) == 216
    assert anew["rows"] == first["rows"]


def test_a_process_that_is_killed_goes_on_where_it_stopped(config: EvaluateConfig, whole: Path) -> None:
    """SIGKILL in the middle; the second call is another process too, and nothing of the first is drawn again."""
    command = [sys.executable, "-m", "tests.slow_evaluation", json.dumps(dataclasses.asdict(config))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    path = Path(config.out) / "samples.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 20:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert process.stdout is not None
    process.stdout.close()
    before = path.read_bytes()
    n = before.count(b"\n")
    assert 20 <= n < 108
    path.write_bytes(before + b'{"adapter": "a", "env": "torn')
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    results = json.loads((Path(config.out) / "results.json").read_text())
    assert figures(results) == figures(json.loads((whole / "results.json").read_text()))
    assert (results["n_found"], results["n_drawn"]) == (n, 108 - n)
    assert path.read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert path.read_bytes().startswith(before)


@pytest.fixture
def evaluated(config: EvaluateConfig, whole: Path) -> EvaluateConfig:
    """A config whose evaluation is done."""
    shutil.copytree(whole, config.out)
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"seed": 1},
        {"max_tokens": 5},
        {"max_turns": 2},
        {"system_prompt": "Be brief."},
        {"env_kwargs": {"template": "{a} + {b}"}},
        {"env": EnvConfig(kwargs=TASK | {"reward": "numeric"})},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"stop_tokens": ["a"]}},
        {"model": {"template_kwargs": {"enable_thinking": False}}},
    ],
)
def test_other_settings_are_other_samples_and_the_former_are_kept(
    evaluated: EvaluateConfig, drawn: list[EpisodeRequest], change: dict[str, Any]
) -> None:
    before = lines(evaluated)
    if "model" in change:
        change = {"model": dataclasses.replace(evaluated.model, **change["model"])}
    assert evaluate(dataclasses.replace(evaluated, **change))["n_found"] == 0
    assert n_drawn(drawn) == len(lines(evaluated)) == 108
    assert lines(evaluated, "earlier.jsonl") == before


def test_a_reward_function_that_has_changed_draws_anew(
    config: EvaluateConfig, tmp_path: Path, drawn: list[EpisodeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config.env.kwargs = TASK | {"reward": {"a_reward:mine": {"weight": 1.0, "worth": 2.0}, "numeric": 0}}
    expected = [108, 0, 108]  # drawn: at first; again; of another reward
    for n, value in zip(expected, ("1.0", "1.0", "0.25"), strict=True):
        source = f"def mine(completion, reference, *, worth):\n    return {value} * worth\n"
        (tmp_path / "a_reward.py").write_text(source)
        monkeypatch.delitem(sys.modules, "a_reward", raising=False)
        importlib.invalidate_caches()
        drawn.clear()
        results = evaluate(config)
        assert n_drawn(drawn) == results["n_drawn"] == n
        assert {sample["reward"] for sample in lines(config)} == {2 * float(value)}


def test_a_base_class_of_the_environment_s_that_has_changed_draws_anew(
    evaluated: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    getsource = inspect.getsource
    changed = "def start(self, seed): ..."
    monkeypatch.setattr(inspect, "getsource", lambda kind: changed if kind is SingleTurnEnv else getsource(kind))
    assert evaluate(evaluated)["n_found"] == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"adapters": "ac"}, 36),
        ({"adapters": "ba"}, 0),
        ({"adapters": ["a", "twin"]}, 0),
        ({"limit": 15}, 27),
        ({"limit": 5}, 0),
        ({"n": 5}, 72),
        ({"n": 2}, 0),
        ({"max_rows": 16, "k": [2], "against": "a"}, 0),
    ],
)
def test_what_is_asked_for_again_is_not_drawn_again(
    evaluated: EvaluateConfig,
    models: Path,
    drawn: list[EpisodeRequest],
    change: dict[str, Any],
    expected: int,
    tmp_path: Path,
) -> None:
    if "adapters" in change:
        change = {"adapters": [str(models / name) for name in change["adapters"]]}
    other = dataclasses.replace(evaluated, **change)
    found = evaluate(other)
    assert n_drawn(drawn) == found["n_drawn"] == expected
    anew = dataclasses.replace(other, out=str(tmp_path / "anew"))
    assert figures(found) == figures(evaluate(anew))
    assert in_order(lines(other)) == in_order(lines(anew))


def in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: (sample["adapter"], sample["problem"], sample["k"]))


def test_what_was_not_asked_for_in_between_has_been_kept(
    evaluated: EvaluateConfig, drawn: list[EpisodeRequest]
) -> None:
    before = lines(evaluated)
    changes: list[dict[str, Any]] = [{"limit": 5}, {"adapters": []}, {"temperature": 0.5, "limit": 1}]
    for change in changes:
        evaluate(dataclasses.replace(evaluated, **change))
    drawn.clear()
    evaluate(evaluated)
    assert not drawn
    assert lines(evaluated) == before


def test_other_weights_under_the_same_name_are_another_adapter(
    config: EvaluateConfig, models: Path, tmp_path: Path, drawn: list[EpisodeRequest]
) -> None:
    policy = Policy.load(str(models / "tiny-llama"), dtype="float32")
    adapter = randomize(policy.bank.add("mine", rank=2), 5)
    for scale in (1.0, 1.001):
        with torch.no_grad():
            adapter.flat.mul_(scale)
        folder = save_adapter(adapter, tmp_path / "mine", policy.name, overwrite=True)
        drawn.clear()
        evaluate(dataclasses.replace(config, adapters=[str(folder)]))
        assert {plays.adapter for plays in drawn} == ({None, "mine"} if scale == 1 else {"mine"})


def test_another_text_or_reference_of_a_problem_is_another_problem(
    config: EvaluateConfig, tmp_path: Path, drawn: list[EpisodeRequest]
) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": i + 1} for i in range(6)]
    kwargs = {"path": str(file), "eval_path": str(file), "reward": TASK["reward"]}
    config = dataclasses.replace(config, env=EnvConfig("rl_lora/Prompts-v0", kwargs), adapters=[], limit=None)
    for change in ({}, {"prompt": "5 + 1"}, {"prompt": "5 + 1", "answer": 7}):
        rows[5] |= change
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        drawn.clear()
        results = evaluate(config)
        assert results["rows"][0]["n_problems"] == 6
        assert n_drawn(drawn) == (3 if change else 18)


def test_adapters_with_the_same_weights_are_drawn_once_and_are_both_rows(
    config: EvaluateConfig, models: Path, drawn: list[EpisodeRequest]
) -> None:
    results = evaluate(dataclasses.replace(config, adapters=[str(models / "b"), str(models / "twin")]))
    assert {plays.adapter for plays in drawn} == {None, "b"}
    _, b, twin = results["rows"]
    names = {"name", "folder"}
    assert {k: v for k, v in b.items() if k not in names} == {k: v for k, v in twin.items() if k not in names}
    assert sum(line["adapter"] == "twin" for line in lines(config)) == 36


def test_together_and_one_by_one_give_the_same_samples(evaluated: EvaluateConfig, models: Path, tmp_path: Path) -> None:
    for name in "ab":
        one = dataclasses.replace(evaluated, adapters=[str(models / name)], out=str(tmp_path / "one by one"))
        evaluate(one)
    alone = {key_of(s): s["completions"] for s in lines(one) + lines(one, "earlier.jsonl")}
    together = {key_of(s): s["completions"] for s in lines(evaluated)}
    assert alone == together
    assert len(together) == 108


def test_a_task_that_fails_keeps_what_was_finished_and_goes_on_from_there(
    config: EvaluateConfig,
    drawn: list[EpisodeRequest],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.tiny_reward.FAILS_AFTER", 70)
    with pytest.raises(ValueError, match="voting raised RuntimeError: no more"):
        evaluate(config)
    kept = len(lines(config))
    assert 0 < kept <= 70
    assert f"stopped; {kept} of 108 samples are in" in " ".join(capsys.readouterr().out.split())
    assert not (Path(config.out) / "results.json").exists()
    monkeypatch.setattr("tests.tiny_reward.FAILS_AFTER", None)
    assert evaluate(config)["n_drawn"] == 108 - kept


def test_two_evaluations_do_not_write_to_one_folder(config: EvaluateConfig) -> None:
    with SampleStore(Path(config.out), {}), pytest.raises(ValueError, match="another evaluation is writing to"):
        evaluate(config)


def test_a_broken_line_in_the_middle_is_named(evaluated: EvaluateConfig) -> None:
    path = Path(evaluated.out) / "samples.jsonl"
    content = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([content[0], b"{broken", *content[1:]]))
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2 is no JSON"):
        evaluate(evaluated)


def test_conversations_are_evaluated(config: EvaluateConfig) -> None:
    gym.register(id="tests/Guess-v0", entry_point="tests.rollout.test_worker:GuessEnv")
    try:
        results = evaluate(dataclasses.replace(config, env=EnvConfig("tests/Guess-v0"), max_tokens=2, max_turns=3))
    finally:
        del gym.registry["tests/Guess-v0"]
    assert results["rows"][0]["turns_per_episode"] > 1
    assert {len(s["completions"]) for s in lines(config)} <= {1, 2, 3}
    assert all(len(s["observations"]) == len(s["completions"]) for s in lines(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": [1, 4]}, "k must be from 1 to n=3, the samples of a problem, got 4"),
        ({"k": [0]}, "got 0"),
        ({"temperature": 0.0}, "n must be 1 at temperature 0, got 3: greedy samples are all the same"),
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"limit": None}, "Arithmetic-v0 has no end of problems: set a limit"),
        ({"against": "z"}, "against must be one of the rows base, a, b, got 'z'"),
        ({"max_tokens": 1000}, "context of 512"),
        ({"adapters": ["nowhere"]}, "no adapter folder at nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    config: EvaluateConfig, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "from_config", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        evaluate(dataclasses.replace(config, **change))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("file", [".lock", "config.yaml"])
def test_a_run_without_an_adapter_is_said_to_have_none_yet(
    file: str, config: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / file).touch()
    with pytest.raises(ValueError, match="has saved no adapter yet; go on with it by its command and --resume true"):
        evaluate(dataclasses.replace(config, adapters=[str(run)]))
    assert is_unfinished(run)
    with pytest.raises(ValueError, match="limit must be"):
        evaluate(dataclasses.replace(config, adapters=[str(run), *config.adapters], limit=0))
    assert "has saved no adapter yet, and is left out" in " ".join(capsys.readouterr().out.split())


def test_the_report_of_a_run_is_not_written_over(config: EvaluateConfig) -> None:
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(ValueError, match="out must not be the folder of a training run"):
        evaluate(config)


def test_what_stands_for_something_else_in_the_table_is_said(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(models / "a", run / "checkpoints" / "step-000005" / "adapter")
    (run / "checkpoints" / "step-000005" / "state.json").write_text("{}")
    paths = [str(models / "b"), str(run / "checkpoints" / "step-000005"), str(models / "b")]
    folders = adapter_folders(paths)
    assert list(path_notes(paths, folders)) == [f"{models / 'b'} stands for b, and is shown once"]
    assert list(path_notes([str(models / "b")], adapter_folders([str(models / "b")]))) == []


def test_a_chosen_row_is_compared_with_and_shown(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(dataclasses.replace(config, against="a"))
    base, a, b = results["rows"]
    assert a["against"] is None
    assert b["against"]["value"] == pytest.approx(b["accuracy"] - a["accuracy"])
    assert base["against"]["value"] == -a["difference"]["value"]
    assert "to a" in capsys.readouterr().out


def test_the_command_takes_lists_as_users_write_them_and_explains_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for args in (["--k", "1,4,16"], ["--k=1,4,16"], ["--k", "[1,4,16]"]):
        parsed = parse(EvaluateConfig, [*args, "--n", "16", "--adapters", "x", "y", "--limit", "null"])
        assert (parsed.k, parsed.adapters, parsed.limit) == ([1, 4, 16], ["x", "y"], None)
    assert parse(EvaluateConfig, ["--k", "4"]).k == [4]
    assert parse(EvaluateConfig, []) == EvaluateConfig()
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in flatten(EvaluateConfig()):
        assert f"--{name} " in text, name
    for help in ("Limit of one reply", "Held-out problems, the first ones", "Values of k for pass@k and maj@k"):
        assert help in text
