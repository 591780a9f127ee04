"""The site builds, without a warning, and holds every option and every public name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rl_lora
import rl_lora.envs
import rl_lora.rewards
from rl_lora.config import EvaluateConfig, TrainConfig
from rl_lora.settings.dotted import flatten
from tests.docs.pages import ROOT

pytest.importorskip("sphinx", reason="sphinx is not installed: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-d", str(folder / "trees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_option_has_an_entry(site: Path) -> None:
    page = (site / "options.html").read_text(encoding="utf-8")
    for command, config in (("train", TrainConfig()), ("evaluate", EvaluateConfig())):
        missing = [name for name in flatten(config) if f'id="cmdoption-rl-lora-{command}-{name}"' not in page]
        assert missing == []


def test_every_public_name_has_an_entry(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for module in (rl_lora, rl_lora.envs, rl_lora.rewards):
        assert [name for name in module.__all__ if f'id="{module.__name__}.{name}"' not in page] == []


def test_wrapped_entries_of_args_are_one_piece_and_types_are_plain(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    assert '<dl class="field-list' in page
    assert '<dl class="simple">' not in page
    assert "Annotated" not in page


def test_every_room_has_a_page(site: Path) -> None:
    rooms = [path.parent.name for path in (ROOT / "rl_lora").glob("*/__init__.py") if not path.parent.is_symlink()]
    assert rooms
    assert [room for room in rooms if not (site / "rooms" / f"{room}.html").exists()] == []
    page = (site / "rooms" / "learner.html").read_text(encoding="utf-8")
    assert 'id="rl_lora.learner.learner.Learner"' in page
