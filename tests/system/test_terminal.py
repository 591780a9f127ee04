"""What models, data sets, names and exceptions hold reaches a terminal as text, and no terminal ends a command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table

from rl_lora.config import TrainConfig
from rl_lora.report import evaluation_table
from rl_lora.report.run_display import ModelFacts, RunDisplay
from rl_lora.scripts.command import run
from rl_lora.system.terminal import UNSEEN, Terminal, in_line, visible
from tests import ROOT

ATTACKS = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x9b31m",
    "\x9d0;x\x9c",
    "\x1bP+q\x1b\\",
    "a\rb",
    "a\bb",
    "\x0e\x0f\x7f\x85",
    "\u202eevil\u2066",
    "\ud800",
    "\udcff",
    "[bold]x[/] [/nope] [link=file:///etc]x[/link] \\[x]",
    ":smile:",
]
texts = st.one_of(st.sampled_from(ATTACKS), st.text(st.characters(categories=None), max_size=60))


def shown_by(show: Callable[[Terminal], object], **options: Any) -> str:
    """What a terminal of no colors is sent."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=options.pop("encoding", "utf-8"), newline="")
    show(Terminal(file=file, width=200, **options))
    file.flush()
    return file.buffer.getvalue().decode(file.encoding)


def printed(show: Callable[[RunDisplay], object]) -> str:
    def shown(terminal: Terminal) -> None:
        display = RunDisplay()
        display.console = terminal
        show(display)

    return shown_by(shown)


def harmless(text: str) -> bool:
    return not UNSEEN.search(text)


@given(texts)
def test_control_characters_are_written_out_and_everything_else_stays(text: str) -> None:
    found = visible(text)
    assert harmless(found)
    visible(found).encode()
    if harmless(text):
        assert found == text
    assert "\n" not in in_line(text)


def test_what_is_shown_tells_which_character_it_was() -> None:
    assert visible("\x1b[31m\x9b\ud800\u202e") == "\\x1b[31m\\x9b\\ud800\\u202e"
    assert in_line(Path("a\nb\t\x1b")) == "a\\nb\\t\\x1b"


@given(texts)
@settings(max_examples=30, deadline=None)
def test_whatever_is_printed_is_harmless_and_without_markup(text: str) -> None:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    assert harmless(shown_by(lambda terminal: terminal.print(table, text, [text])))
    if text.isprintable() and text.strip() == text:
        assert text in shown_by(lambda terminal: terminal.print(text))


@given(texts)
@example(ATTACKS[0])
@settings(max_examples=30, deadline=None)
def test_a_terminal_of_another_encoding_is_sent_what_it_can_show(text: str) -> None:
    for encoding in ("ascii", "latin-1", "cp1252"):
        assert harmless(shown_by(lambda terminal: terminal.print("–…", text), encoding=encoding))


@given(texts, texts)
@settings(max_examples=25, deadline=None)
def test_the_table_of_samples_the_headers_and_the_progress_are_harmless(prompt: str, reply: str) -> None:
    def show(display: RunDisplay) -> None:
        episodes = [
            SimpleNamespace(observations=[prompt], turns=[SimpleNamespace(text=reply)], reward=r) for r in (0, 1)
        ]
        display.samples(1, [SimpleNamespace(episodes=episodes)])  # type: ignore[list-item]
        config = TrainConfig()
        config.env.id = prompt
        display.header(config, ModelFacts(reply, 1, "float32", "cpu", 1, 1, [prompt], prompt), 1, 1)
        with display.stage(prompt), display.progress(3, 1):
            display.sampling(5)

    assert harmless(printed(show))


@given(texts)
@settings(max_examples=25, deadline=None)
def test_the_table_of_an_evaluation_is_harmless(name: str) -> None:
    numbers: dict[str, Any] = dict.fromkeys(
        ("accuracy", "reward", "format", "truncated", "unscorable", "tokens_per_episode"), 0.5
    )
    rows = [
        numbers | {"name": n, "difference": None, "against": None, "pass": {}, "majority": {}} for n in ("base", name)
    ]
    results = {"rows": rows, "config": {"against": name}, "k": [1]}
    assert harmless(shown_by(lambda terminal: evaluation_table.show(terminal, results)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_line_of_an_error_is_harmless(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError(f"no file {attack}")

    assert run(fail) == 2
    assert capsys.readouterr().err == f"error: no file {visible(attack)}\n"


COMMANDS = """
import sys, warnings
from rl_lora.scripts.command import main
from rl_lora.scripts.configs import PlotConfig
from rl_lora.system.terminal import say
def work(config):
    say("\\u2013 \\ud800 \\x1b]0;x\\x07"); print("\\u2013"); warnings.warn("\\x1b[2J")
    raise RuntimeError("\\x1b]52;c;x\\x07")
main(PlotConfig, work)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_ends_a_command_and_tracebacks_and_warnings_are_harmless(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "ü.yaml").write_text("out: ü\n", encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-X", "utf8=0", "-c", COMMANDS, "--config", "ü.yaml"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    dash = "–" if encoding == "utf-8" else "\\u2013"
    assert (done.returncode, out) == (1, f"{dash} \\ud800 \\x1b]0;x\\x07\n{dash}\n")
    assert "RuntimeError: \\x1b]52;c;x\\x07" in err
    assert "UserWarning: \\x1b[2J" in err
    assert harmless(err)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("lost", ["a full disk", "a pipe that nobody reads"])
def test_a_stream_that_is_lost_ends_no_command(stream: str, lost: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom rl_lora.system.terminal import Terminal, guard\nguard()\n"
        "for i in range(9):\n    Terminal().print('x' * 9999)\n    Terminal(stderr=True).print('y' * 9999)\n"
        "    print('z' * 9999)\nPath(sys.argv[1]).touch()\nsys.exit(7)\n"
    )
    if lost == "a full disk":
        end = os.open("/dev/full", os.O_WRONLY)
    else:
        read, end = os.pipe()
        os.close(read)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: end}
    command = [sys.executable, "-c", script, str(tmp_path / "done")]
    result = subprocess.run(command, cwd=ROOT, **streams, text=True)
    os.close(end)
    assert (tmp_path / "done").exists()
    assert result.returncode == 7
    assert "Traceback" not in (result.stderr or "") + (result.stdout or "")
