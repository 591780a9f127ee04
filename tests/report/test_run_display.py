"""What a run prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_lora.config import TrainConfig
from rl_lora.report.run_display import ModelFacts, RunDisplay, held_out_line, step_line
from rl_lora.system.plurals import counted


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (2048, "2,048 steps"), (-1, "-1 steps")]
)
def test_a_noun_agrees_with_its_number(n: int, said: str) -> None:
    assert counted(n, "step") == said
    assert counted(n, "process", "processes").endswith("process" if n == 1 else "processes")


def record(**changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("reward", "accuracy", "entropy", "sampler_learner_kl", "grad_norm", "truncated"), 0.5)
    more = {"groups_without_signal": 0.25, "groups_replaced": 0, "unscorable": 0.0, "tokens_per_episode": 1.0}
    return {**figures, **more, "loss": 0.1, "seconds/rollout": 1.0, "seconds/learn": 2.0, "episodes": 1} | changes


def test_the_line_of_a_step_has_the_figures_of_its_kind() -> None:
    assert step_line(3, record()) == (
        "step   3  reward 0.500  entropy 0.50  kl 0.5000  grad 0.5  equal 25%  cut 50%  1 token  1.0+2.0 s"
    )
    assert "accuracy 1.000" in step_line(3, record(accuracy=1.0))
    assert step_line(3, record(groups_without_signal=None, tokens_per_episode=9.6)) == (
        "step   3  loss 0.100  entropy 0.50  grad 0.5  10 tokens  1.0+2.0 s"
    )
    assert "waited 2.0 s for rewards" in step_line(3, record(**{"seconds/reward": 2.0}))


def test_the_line_of_an_evaluation_leaves_out_what_there_is_not() -> None:
    assert held_out_line(record()) == "accuracy 50.0%, reward 0.500, cut off 50% (1 episode)"
    assert held_out_line(record(accuracy=None, reward=None, episodes=2)) == "reward –, cut off 50% (2 episodes)"


def summary(**changes: Any) -> dict[str, Any]:
    ends = {"before": record(accuracy=0.5), "after": record(accuracy=0.75), "reward_first": 0.1, "reward_last": None}
    gain = {"difference": 0.25, "low": 0.1, "high": 0.4, "p": 0.01}
    places = {"adapter": "runs/a/adapter", "best_checkpoint": "runs/a/c", "best_score": 0.5, "next": "rl-lora evaluate"}
    rest = {"steps": 1, "seconds": 90.0, "change": gain, "warnings": [], "learned": True, "scored": True}
    return {**ends, **places, **rest, "transcripts": [], "unscorable": {}, "unscorable_held_out": {}} | changes


def test_a_run_of_one_ends_with_its_results_its_files_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    display = RunDisplay()
    config = TrainConfig()
    config.rollout.prompts_per_step = config.rollout.group_size = 1
    display.header(config, ModelFacts("m", 2_000_000, "float32", "cpu", 1000, 1, dropout=0.1), 0, 1)
    display.summary(tmp_path, summary())
    said = capsys.readouterr().out
    for part in (
        "1 problem x 1 episode a step",
        "m: 2M parameters frozen (float32, cpu, 1 process), 1,000 trained (rank 1)",
        "was trained with lora_dropout 0.1",
        "\n1 step in 1.5 minutes",
        "change  +25.0 points (95 %: +10.0 to +40.0), paired by problem",
        "0.100 in the first step, – in the last",
        "(no better than before training)",
        f"report        {tmp_path / 'report.html'}",
        "next          rl-lora evaluate",
    ):
        assert part in said


def test_a_run_that_learned_nothing_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDisplay().summary(tmp_path, summary(learned=False, warnings=["look"]))
    said = capsys.readouterr().out
    assert "nothing was learned: no group had different rewards" in said
    assert "look" in said
    RunDisplay().summary(tmp_path, summary(learned=False, scored=False, unscorable={"no tests": 3}))
    said = capsys.readouterr().out
    assert "nothing could be scored: 3 x no tests" in said
    assert "nothing was learned" not in said


def test_other_processes_than_the_first_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDisplay(is_visible=False).summary(tmp_path, summary())
    assert capsys.readouterr().out == ""
