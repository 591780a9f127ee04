"""The report of a training run: in a browser, while it is going on, and from the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rl_lora.metrics.records import MetricsFile
from rl_lora.report.folder_page import write_report
from rl_lora.report.training_page import training_page
from tests.conftest import Open
from tests.report.test_evaluation_page import seeds_shown


def training_run(run_dir: Path, n_steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """The files of a run of 20 steps that has come to step n_steps; returns its records."""
    rng = random.Random(seed)
    (run_dir / "evals").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("steps: 20\nenv: {id: Task-v0}\nmodel: {name: tiny}\n")
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    names = """
        reward accuracy truncated entropy sampler_learner_kl grad_norm step_norm A_norm B_norm seconds/rollout
    """.split()  # noqa: SIM905
    for step in range(n_steps + 1):
        if step:
            record = {name: rng.random() for name in names} | {"clip_fraction": 0.0, "loss": None}
            metrics.append("train", step, record)
        if step % 5 == 0:
            accuracy = rng.random()
            record = {"accuracy": accuracy, "accuracy_low": accuracy / 2, "accuracy_high": 1.0, "reward": rng.random()}
            metrics.append("eval", step, record | {"episodes": 4, "truncated": 0.0, "seconds/evaluate": 1.0})
            solved = 2 if step else 3
            samples = [
                {
                    "adapter": "policy",
                    "seed": q,
                    "problem": q,
                    "unscorable": False,
                    "observations": [f"Problem {q}?"],
                    "completions": [str(step if q else 0)],
                    "reward": 0.5,
                    "success": q == solved,
                }
                for q in range(4)
            ]
            lines = "".join(json.dumps(sample) + "\n" for sample in samples)
            (run_dir / "evals" / f"step-{step:06d}.jsonl").write_text(lines)
    return metrics.read()


def test_the_page_of_a_run_shows_its_records_and_what_changed_first(open_page: Open, tmp_path: Path) -> None:
    records = training_run(tmp_path / "run", 20)
    page = open_page(training_page(tmp_path / "run"))
    evals = [record for record in records if record["kind"] == "eval"]
    assert page.locator(".kind").inner_text() == "Training run"
    figures = page.locator(".headline strong").all_inner_texts()
    assert figures[:-1] == [f"{100 * record['accuracy']:.1f} %" for record in (evals[0], evals[-1])]
    assert figures[-1] == "+0.0 points", "each solves one of the four problems"
    titles = page.locator("figcaption b").all_inner_texts()
    assert {"Accuracy", "Sampler against learner", "Adapter norms", "Step norm", "Seconds"} < set(titles)
    assert not {"Loss", "Clipped", "Tokens per second"} & set(titles), "nothing is known of these, or never happened"
    norms = page.locator("figure.chart", has_text="Adapter norms")
    norms.locator("svg").focus()
    page.keyboard.press("End")
    A, B = (records[-2][name] if records[-2]["kind"] == "train" else records[-1][name] for name in ("A_norm", "B_norm"))
    for name, value in (("A", A), ("B", B)):
        assert f"{name} {value:.3f}" in norms.locator(".tooltip").inner_text()
    assert seeds_shown(page) == [2, 3, 1, 0], "newly solved, no longer solved, other words, the same"
    assert page.locator(".shortcuts button").all_inner_texts() == [
        "solved by step 20, not by step 0: 1",
        "solved by step 0, not by step 20: 1",
    ]


def test_episodes_sampled_in_training_are_shown_step_by_step_the_best_first(open_page: Open, tmp_path: Path) -> None:
    training_run(tmp_path / "run", 20)
    rng = random.Random(1)
    folder = tmp_path / "run" / "samples"
    folder.mkdir()
    for step in (1, 2, 20):
        samples = [
            {
                "adapter": "policy",
                "problem": None,
                "seed": seed,
                "observations": [f"Sum {seed}?"],
                "completions": [f"<b>step {step} seed {seed} reply {k}</b>"],
                "reward": rng.random(),
                "success": None,
            }
            for seed in (7, 8)
            for k in range(6)
        ]
        (folder / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = open_page(training_page(tmp_path / "run"))
    section = page.locator("#sampled")
    assert section.locator("select option").all_inner_texts() == ["1", "2", "20"]
    assert section.locator(".count").inner_text() == "12 episodes of 2 problems, as they were sampled"
    assert section.locator("article").count() == 2
    first = section.locator("article").first
    assert first.locator(".said").inner_text() == "Sum 7?"
    rewards = [float(text.rpartition("reward ")[2]) for text in first.locator(".meta").all_text_contents()]
    assert len(rewards) == 6
    assert rewards[:3] == sorted(rewards, reverse=True)[:3]
    assert rewards[3] == min(rewards), "the worst is shown beside the best, the others on demand"
    assert "<b>step 20 seed 7 reply" in first.locator(".reply pre").first.inner_text()
    assert section.get_by_role("button", name="Next").is_disabled()
    section.get_by_role("button", name="Previous").click()
    assert "<b>step 2 seed 7 reply" in first.locator(".reply pre").first.inner_text()
    section.locator("select").select_option("1")
    assert "<b>step 1 seed 7 reply" in first.locator(".reply pre").first.inner_text()


def test_bars_stand_on_their_points_and_a_colour_means_one_thing(open_page: Open, tmp_path: Path) -> None:
    training_run(tmp_path / "run", 20)
    page = open_page(training_page(tmp_path / "run"))
    accuracy = page.locator("figure.chart", has_text="Accuracy").first
    held_out = accuracy.locator("g.s0")
    bars = [
        float(part.partition(",")[0]) for part in str(held_out.locator(".whiskers").get_attribute("d")).split("M")[1::2]
    ]
    circles = [float(str(circle.get_attribute("cx"))) for circle in held_out.locator("circle").all()]
    assert bars == pytest.approx(circles, abs=0.01)
    colours: dict[str, set[str]] = {}
    for entry in page.locator(".legend button").all():
        colours.setdefault(entry.inner_text(), set()).add(str(entry.locator("i").get_attribute("class")))
    assert colours["held out"] == {"s0"}
    assert colours["sampled in training"] == {"s1"}
    assert colours["cut off"] == colours["sampling"] == {"s1"}


def test_settings_and_what_a_collapsed_run_says_are_on_its_page(open_page: Open, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    training_run(run_dir, 20)
    (run_dir / "config.yaml").write_text(
        "steps: 20\nseed: 3\nadapter: {rank: 4}\nlearner: {learning_rate: 0.0001, objective: reinforce}\n"
        "rollout: {prompts_per_step: 16, group_size: 8}\nenv: {id: Task-v0}\nmodel: {name: tiny}\n"
    )
    samples = [json.loads(line) for line in (run_dir / "evals" / "step-000020.jsonl").read_text().splitlines()]
    many = [
        s | {"seed": i, "problem": i, "observations": [f"P{i}"], "completions": ["2"]}
        for i in range(10)
        for s in samples[:1]
    ]
    (run_dir / "evals" / "step-000020.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in many))
    page = open_page(training_page(run_dir))
    facts = page.locator(".facts").inner_text()
    for fact in ("16 problems x 8 episodes", "4", "0.0001", "reinforce"):
        assert fact in facts
    assert "100% of the held-out replies are the same, '2'" in page.locator(".warning").inner_text()
    changed = page.locator("div.config").inner_text()
    assert "adapter.rank" in changed
    assert "rollout.group_size" not in changed, "the default"


def test_a_run_is_reported_while_it_is_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    training_run(run_dir, 7)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # being written
    with (run_dir / "evals" / "step-000005.jsonl").open("a") as file:
        file.write('{"seed": 4, "obser')
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "Training run, not finished" in page
    assert "7 of 20" in page
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")


def test_the_report_command_says_what_it_cannot_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not there"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="older"):
        write_report(tmp_path)
