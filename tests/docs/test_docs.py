"""What `docs/rewards.md` shows runs, in its order, in one folder: its files, its Python, its commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.tiny import tiny_folder

PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:`(?P<file>[\w.]+)`:\n\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page shows, and a tiny model in place of the default one."""
    folder = tmp_path_factory.mktemp("clone")
    tiny_folder(folder, "llama")
    for block in BLOCK.finditer(PAGE):
        if block["file"]:
            (folder / block["file"]).write_text(block["text"])
    return folder


def run(arguments: list[str], place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(place)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PYTHON = [block["text"] for block in BLOCK.finditer(PAGE) if block["kind"] == "python" and not block["file"]]
COMMANDS = [block["text"] for block in BLOCK.finditer(PAGE) if block["kind"] == "sh"]


def test_every_block_of_the_page_is_looked_at() -> None:
    kinds = [(block["file"], block["kind"]) for block in BLOCK.finditer(PAGE)]
    assert len(kinds) == PAGE.count("```") / 2
    assert all(file or kind in ("python", "sh") for file, kind in kinds)
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_of_the_page_runs(place: Path, code: str) -> None:
    defaults = "from rl_lora.config import ModelConfig\nfirst = ModelConfig.__init__\n"
    defaults += "first.__defaults__ = ('tiny-llama', 'float32', *first.__defaults__[2:])\n"
    run(["-c", defaults + code], place)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_run(place: Path, command: str) -> None:
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert python == ".venv/bin/python"
    model = (
        ["--model", "tiny-llama"]
        if "benchmark" in script
        else ["--model.name", "tiny-llama", "--model.dtype", "float32"]
    )
    run([str(ROOT / script), *arguments, *model], place)
