"""A run and an evaluation may die at any operation on a file: what they come to when they go on is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def crash(folder: Path, scenarios: str, *n_random: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.crash_points", str(folder), scenarios, *n_random]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_command_that_dies_at_some_operation_on_a_file_comes_to_the_same(tmp_path: Path) -> None:
    results = crash(tmp_path, "run,evaluation", "3")
    for name, least in (("run", 200), ("evaluation", 25)):
        assert results[name]["wrong"] == []
        assert results[name]["points"] > least


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["run", "longer", "damaged", "evaluation", "other"])
def test_a_command_that_dies_at_any_operation_on_a_file_comes_to_the_same(scenario: str, tmp_path: Path) -> None:
    result = crash(tmp_path, scenario)[scenario]
    assert result["wrong"] == []
    assert result["tried"] == result["points"]
