"""Imports run one way: `scripts/imports.py` draws them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rl_lora.scripts.imports import circles, floors, imports, rooms, upward
from tests import ROOT


def test_no_import_runs_upwards() -> None:
    assert upward(imports(ROOT)) == []


def test_no_modules_import_each_other_and_no_rooms() -> None:
    graph = imports(ROOT)
    assert circles(graph) == circles(rooms(graph)) == []


def test_the_core_stands_on_nine_floors_at_most() -> None:
    assert max(floors(rooms(imports(ROOT))).values()) <= 9


def test_a_circle_an_upward_import_and_a_hidden_one_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "rl_lora"
    for name, text in {
        "types.py": "import types",
        "policy/policy.py": "from rl_lora.sampler.draw import draw\nfrom rl_lora import types",
        "sampler/draw.py": "def draw():\n    from rl_lora.policy import policy",
        "sampler/rows.py": "if TYPE_CHECKING:\n    import rl_lora.learner.batch",
        "learner/batch.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    graph = imports(tmp_path)
    assert circles(graph) == [["policy.policy", "sampler.draw"]]
    assert upward(graph) == [
        "policy.policy -> sampler.draw: draw",
        "sampler.rows -> learner.batch: rl_lora.learner.batch",
    ]
    assert floors(rooms(graph)) == {"types": 1, "policy": 2, "sampler": 2, "learner": 1}


def test_no_module_puts_a_folder_of_the_package_before_the_standard_library() -> None:
    names = [f"rl_lora.{name}" for name in imports(ROOT) if name.startswith("scripts.") and name != "scripts.imports"]
    code = f"import importlib, sys; before = list(sys.path); [importlib.import_module(n) for n in {names}]; "
    code += "print([p for p in sys.path if p not in before])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
