"""What contributors rely on: the same checks before a commit, in CI and by hand, on every Python that is supported."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.docs.pages import blocks_of

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_commits_are_checked_by_what_make_test_checks_with() -> None:
    [repository] = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0].replace("$(VENV)", ".venv")
    assert len(hooks) == 3
    assert all(hook in lint for hook in hooks), lint


def test_the_workflow_tests_every_python_that_is_supported() -> None:
    job = parsed(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]
    pythons = [float(version.partition(".")[2]) for version in job["strategy"]["matrix"]["python"]]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["options"]["python_requires"] == f">=3.{min(pythons):.0f}"
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    assert re.search(r"^test: ", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_of_an_issue_asks_for_something(name: str) -> None:
    form = parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    assert any(field.get("validations", {}).get("required") for field in fields.values())


def test_an_example_is_short() -> None:
    examples = [block for block in blocks_of(ROOT / "CONTRIBUTING.md") if block.kind == "python"]
    assert len(examples) == 4
    assert all(block.text.count("\n") < 30 for block in examples)


def test_each_install_names_extras_that_there_are() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    made = [
        subprocess.run(["make", "-nB", goal], cwd=ROOT, capture_output=True, text=True) for goal in ("test", "docs")
    ]
    installs = re.findall(r"-e '(.*)'", "\n".join(each.stdout for each in made))
    extras = [name for each in installs if each != "." for name in each.removeprefix(".[").removesuffix("]").split(",")]
    assert {"test", "docs"} <= set(extras) <= set(setup["options.extras_require"]), installs
