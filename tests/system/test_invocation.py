"""A command that is printed starts where it is printed, in the way that the program was started which prints it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rl_lora.system.invocation import PACKAGE, is_first_process, launcher, words
from tests import ROOT


@pytest.mark.parametrize("on_path", [True, False])
def test_the_installed_command_names_itself(on_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rl-lora").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "rl-lora"), "train"])
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    assert words("evaluate") == ["rl-lora" if on_path else str(tmp_path / "rl-lora"), "evaluate"]
    monkeypatch.chdir(tmp_path)
    assert words("evaluate") == ["rl-lora", "evaluate"]


def test_a_script_of_the_clone_and_python_name_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for started in ("scripts/train.py", "", "my_notebook.py"):
        monkeypatch.setattr(sys, "argv", [started])
        monkeypatch.chdir(ROOT)
        assert words("evaluate")[1:] == ["scripts/evaluate.py"]
        monkeypatch.chdir(tmp_path)
        assert words("evaluate")[1:] == [str(ROOT / "scripts" / "evaluate.py")]


def test_the_module_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(PACKAGE / "__main__.py"), "train"])
    assert words("evaluate")[1:] == ["-m", "rl_lora", "evaluate"]


def test_a_launcher_is_named_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher() == []
    monkeypatch.setattr("rl_lora.system.invocation.UNDER_LAUNCHER", True)
    for program, *args in (["/there/torchrun", "--nproc_per_node", "2", "x.py"], ["-m", "accelerate.cli", "launch"]):
        monkeypatch.setattr("psutil.Process.cmdline", lambda process, line=[program, *args]: ["/bin/python", *line])
        *python, shown = launcher()[: -len(args)]
        assert (shown, launcher()[-len(args) :]) == (program, args)
        assert len(python) == program.startswith("-")


def test_the_words_start_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.chdir(tmp_path)
    line = shlex.join([*words("evaluate"), "--version"])
    assert subprocess.run(line, shell=True, capture_output=True, text=True).stdout.startswith("rl_lora ")


def test_the_first_process_is_known_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not is_first_process()
            patch.setenv(name, "0")
            assert is_first_process()
