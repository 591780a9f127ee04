"""The HTML report as its reader meets it: opened in a browser, filtered, searched, and safe from what models write."""

from __future__ import annotations

import itertools
import json
import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from rl_lora.report.evaluation_page import evaluation_page
from rl_lora.report.folder_page import write_report
from tests.conftest import Open

HOSTILE = (
    '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    "</script x> <!-- <script <b>&amp;\u2028\ud800 `${1}`"
)


def evaluation(
    n_rows: int = 3, n_problems: int = 30, n: int = 1, seed: int = 0, steps: bool = True, verdicts: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and samples of random verdicts. Every number of them is to be found on the page."""
    rng = random.Random(seed)
    names = ["base", *(f"demo/step-{i:06d}" for i in range(1, n_rows))]
    samples: list[dict[str, Any]] = [
        {
            "adapter": name,
            "problem": f"hash{q}",
            "seed": 100 + q,
            "k": k,
            "observations": [f"What is {q} + 40?"],
            "completions": [f"It is {q + 40 + rng.choice((0, 1, 2))}, says {name}."],
            "reference": q + 40,
            "answer": None,
            "reward": rng.choice((0.0, 0.5, 1.0)),
            "reward_parts": {},
            "success": rng.random() < 0.2 + 0.5 * i / n_rows if verdicts else None,
            "truncated": False,
            "unscorable": False,
            "tokens": 7,
        }
        for q in range(n_problems)
        for i, name in enumerate(names)
        for k in range(n)
    ]
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        accuracy = rng.random()
        near = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
        rows.append(
            {
                "name": name,
                "folder": f"runs/demo/checkpoints/{name[5:]}" if i else "",
                "step": 5 * i if i and steps else None,
                "n_problems": n_problems,
                "n_samples": n_problems * n,
                "accuracy": accuracy if verdicts else None,
                "accuracy_low": near["low"] if verdicts else None,
                "accuracy_high": near["high"] if verdicts else None,
                "reward": rng.random(),
                "pass": {str(k): near for k in (1, 2, 4) if k <= n} if verdicts else {},
                "majority": {},
                "format": None,
                "truncated": 0.0,
                "unscorable": 0.0,
                "tokens_per_episode": 7.0,
                "difference": {"value": 0.125, "low": -0.02, "high": 0.27, "p": 0.04} if i and verdicts else None,
            }
        )
    pair = {"difference": 0.125, "low": -0.02, "high": 0.27, "p": 0.04}
    pairs = [[pair if i != j and verdicts else None for j in range(n_rows)] for i in range(n_rows)]
    config = {"model": {"name": "tiny"}, "env": {"id": "Task-v0", "kwargs": {}}, "temperature": 0.0}
    return {
        "kind": "evaluation",
        "config": config,
        "hashes": {"problems": "abc"},
        "seconds": 12.0,
        "k": [1],
        "rows": rows,
        "pairs": pairs,
    }, samples


def rate(samples: list[dict[str, Any]], name: str, seed: int) -> float:
    verdicts = [float(s["success"]) for s in samples if s["adapter"] == name and s["seed"] == seed]
    return sum(verdicts) / len(verdicts)


def n_found(page: Any) -> int:
    return int(page.locator(".count").inner_text().split(" of ")[0].replace(",", ""))


def seeds_shown(page: Any) -> list[int]:
    return [
        int(re.findall(r"seed (\d+)", text)[0]) for text in page.locator("#problems article header").all_inner_texts()
    ]


@pytest.mark.parametrize("n", [1, 4])
def test_the_filter_finds_what_one_row_solves_and_another_does_not(open_page: Open, n: int) -> None:
    results, samples = evaluation(n=n)
    names = [row["name"] for row in results["rows"]]
    seeds = sorted({sample["seed"] for sample in samples})
    page = open_page(evaluation_page(results, samples))
    assert n_found(page) == len(seeds)
    for a, b in [(1, 0), (0, 2), (2, 1)]:
        page.select_option("select[name=a]", str(a))
        page.select_option("select[name=b]", str(b))
        expected = [s for s in seeds if rate(samples, names[a], s) > rate(samples, names[b], s)]
        assert n_found(page) == len(expected)
        assert seeds_shown(page) == expected[:20]
        first = page.locator("#problems article").first.locator(".answers > li b")
        assert names[a] in first.nth(0).inner_text(), "the two rows that are compared come first"
        assert names[b] in first.nth(1).inner_text()
    page.select_option("select[name=b]", "")
    assert n_found(page) == sum(rate(samples, names[2], s) > 0 for s in seeds)
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("only where verdicts differ").check()
    assert n_found(page) == sum(len({rate(samples, name, s) for name in names}) > 1 for s in seeds)


def test_a_press_on_a_pair_or_a_shortcut_filters_the_samples(open_page: Open) -> None:
    results, samples = evaluation()
    names, seeds = [row["name"] for row in results["rows"]], sorted({sample["seed"] for sample in samples})
    expected = {
        (a, b): sum(rate(samples, names[a], s) > rate(samples, names[b], s) for s in seeds)
        for a in range(3)
        for b in range(3)
    }
    page = open_page(evaluation_page(results, samples))
    page.locator("#pairs button[data-a='2'][data-b='1']").click()
    assert n_found(page) == expected[2, 1]
    page.keyboard.press("ArrowUp")  # over the diagonal
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("aria-label").startswith("base minus demo/step-000001")
    assert n_found(page) == expected[0, 1]
    best = max(range(1, 3), key=lambda row: results["rows"][row]["accuracy"])
    shortcut = page.locator(".shortcuts button").first
    assert shortcut.inner_text() == f"solved by {names[best]}, not by base: {expected[best, 0]}"
    shortcut.click()
    assert n_found(page) == expected[best, 0]
    shortcut.click()
    assert n_found(page) == len(seeds)


def test_text_is_searched_in_prompts_references_and_replies_and_pages_hold_every_problem_once(open_page: Open) -> None:
    results, samples = evaluation(n_problems=45)
    page = open_page(evaluation_page(results, samples))
    shown = seeds_shown(page)
    while page.get_by_role("button", name="Next").is_enabled():
        page.get_by_role("button", name="Next").click()
        shown += seeds_shown(page)
    assert shown == list(range(100, 145))
    for text in ("WHAT IS 7 + 40", "It is 61", "says demo/step-000002"):
        page.fill("input[type=search]", text)
        written = {
            s["seed"]: " ".join(x["observations"][0] + x["completions"][0] for x in samples if x["seed"] == s["seed"])
            for s in samples
        }
        expected = [seed for seed, words in written.items() if text.lower() in words.lower()]
        assert expected
        page.locator("#problems article", has_text=f"seed {expected[0]}").wait_for()  # typing is waited for
        page.locator(".count", has_text=re.compile(f"^{len(expected)} of ")).wait_for()
        assert seeds_shown(page) == expected[:20]


def test_the_plot_and_the_table_say_the_numbers_and_the_table_sorts(open_page: Open) -> None:
    results, samples = evaluation(n_rows=5)
    rows = results["rows"]
    page = open_page(evaluation_page(results, samples))
    plot = page.locator("figure.chart").first
    plot.locator("svg").focus()
    for row in rows[1:]:
        page.keyboard.press("ArrowRight")
        said = " ".join(plot.locator(".tooltip").inner_text().split())
        value, low, high = (f"{100 * row[key]:.1f}" for key in ("accuracy", "accuracy_low", "accuracy_high"))
        assert said.startswith(f"step {row['step']} accuracy {value} % ({low} to {high}) base ")
    cells = page.locator("#results tbody tr").all_inner_texts()
    for row, text in zip(rows, cells, strict=True):
        assert f"{100 * row['accuracy']:.1f} %" in text
        assert f"{row['reward']:.3f}" in text
    assert "+12.5" in cells[1]
    assert "0.040" in cells[1]
    for direction in (-1, 1):
        page.get_by_role("button", name="accuracy").click()
        names = [text.split("\t")[0].strip() for text in page.locator("#results tbody tr").all_inner_texts()]
        assert names == [row["name"] for row in sorted(rows, key=lambda row: direction * row["accuracy"])]


def test_what_models_wrote_is_shown_as_it_is_and_runs_nowhere(open_page: Open) -> None:
    results, samples = evaluation(n_problems=1)
    results["config"]["env"]["id"] = results["config"]["note"] = results["rows"][1]["name"] = HOSTILE
    for sample in samples:
        sample |= {"observations": [HOSTILE], "completions": [HOSTILE], "reference": HOSTILE, "answer": HOSTILE[:50]}
        sample["adapter"] = HOSTILE if sample["adapter"] == "demo/step-000001" else sample["adapter"]
        sample["reward_parts"] = {HOSTILE: 1.0, "b": 0.0}
    results["rows"][2]["reward"] = samples[0]["reward"] = float("nan")
    page = open_page(evaluation_page(results, samples))
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b > script, article script").count() == 0
    article = page.locator("#problems article")
    texts = [article.locator("pre").first, article.locator(".replies pre").first, article.locator("code")]
    assert [text.evaluate("node => node.textContent") for text in texts] == [HOSTILE] * 3  # \ud800, too
    assert page.wrong == []
    markup = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')"
    assert "Refused" in page.evaluate(
        f"""new Promise(done => {{
            document.addEventListener("securitypolicyviolation", event => done(`Refused ${{event.violatedDirective}}`));
            {markup}; setTimeout(() => done("let through"), 2000) }})"""
    ), "markup that got onto the page all the same can neither run nor load"
    assert page.evaluate("window.hacked") is None
    assert page.wrong
    assert all("Content Security Policy" in message for message in page.wrong)
    page.wrong.clear()


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "no samples": (evaluation()[0], []),
    "one row": evaluation(n_rows=1),
    "50 rows": evaluation(n_rows=50, n_problems=3, steps=False),
    "several samples": evaluation(n=4, n_problems=5),
    "no verdicts": evaluation(verdicts=False),
    "no rows": (evaluation()[0] | {"rows": [], "pairs": []}, []),
}


@pytest.mark.parametrize("case, dark", list(zip(CASES, itertools.cycle([True, False]))))
def test_no_page_is_wider_than_the_screen(open_page: Open, case: str, dark: bool) -> None:
    results, samples = CASES[case]
    page = open_page(evaluation_page(results, samples), dark=dark)
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure.chart svg").count() == page.locator("figure.chart").count()
    assert page.locator("#problems article").count() == min(20, len({sample["seed"] for sample in samples}))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) is dark


def test_without_verdicts_rewards_are_compared(open_page: Open) -> None:
    results, samples = evaluation(verdicts=False)
    page = open_page(evaluation_page(results, samples))
    reward = {(sample["adapter"], sample["seed"]): sample["reward"] for sample in samples}
    page.get_by_label("Better with").select_option("1")
    page.get_by_label("than with").select_option("2")
    expected = [s for s in range(100, 130) if reward["demo/step-000001", s] > reward["demo/step-000002", s]]
    assert seeds_shown(page) == expected[:20]


def test_a_conversation_shows_who_said_what(open_page: Open) -> None:
    results, samples = evaluation(n_rows=1, n_problems=1)
    samples[0] |= {"observations": ["Guess.", "Higher."], "completions": ["3", "5"]}
    page = open_page(evaluation_page(results, samples))
    replies = page.locator(".replies pre")
    assert replies.all_inner_texts() == ["3", "Higher.", "5"]
    assert [reply.get_attribute("class") for reply in replies.all()] == ["", "said", ""]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2 contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for() -> None:
    style = (files("rl_lora.report") / "page_assets" / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("ink", "soft", "accent", "good", "bad", "warn"):
            for ground in ("ground", "raised", "mark"):
                assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
        for sign in ("good", "bad"):
            assert contrast(scheme[sign], scheme[f"{sign}-tint"]) >= 4.5
            assert contrast(scheme["soft"], scheme[f"{sign}-tint"]) >= 4.5
        assert all(contrast(scheme[f"c{i}"], scheme["ground"]) >= 3 for i in range(8))


def test_an_evaluation_is_reported_from_its_files_and_rows_of_the_same_weights_share_samples(tmp_path: Path) -> None:
    results, samples = evaluation(n_problems=2)
    names = [row["name"] for row in results["rows"]]
    results["hashes"]["adapters"] = {names[0]: "base", names[1]: "same", names[2]: "same"}
    drawn = [sample for sample in samples if sample["adapter"] != names[2]]
    for sample in drawn:
        sample["adapter_hash"] = "base" if sample["adapter"] == names[0] else "same"
        sample["adapter"] = None if sample["adapter"] == names[0] else "an older name"
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in drawn))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])
    assert data["browser"]["rows"] == names
    for problem in data["browser"]["problems"]:
        assert set(problem["samples"]) == {"0", "1", "2"}
        assert problem["samples"]["1"] == problem["samples"]["2"]
