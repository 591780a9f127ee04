"""Files are read and written in UTF-8, whatever the locale."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = sorted(p for folder in ("rl_lora", "envs", "rewards", "scripts") for p in (ROOT / folder).rglob("*.py"))


def without_encoding(source: str) -> list[str]:
    """Calls that open a file as text, in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        if module in ("disk", "files", "os") and name != "fdopen":
            continue
        if not module and name != "open":
            continue
        if name == "open" and module in NOT_FILES:
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        binary = any(isinstance(v, ast.Constant) and isinstance(v.value, str) and v.value in BINARY for v in values)
        given = any(keyword.arg in ("encoding", None) for keyword in node.keywords)
        if name in ("open", "fdopen", "read_text", "write_text") and not (binary or given):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


NOT_FILES = {"self.run_log", "tarfile"}
"""What has an `open` of its own."""
BINARY = {"rb", "wb", "ab", "xb", "r+b", "rb+", "w+b"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_opened_as_utf_8(path: Path) -> None:
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_what_depends_on_the_locale_is_found() -> None:
    assert len(without_encoding("open(a)\nPath(a).open('w')\nb.read_text()\nb.write_text(c)\nos.fdopen(1)")) == 5
    assert without_encoding("open(a, 'rb')\nb.read_text(encoding='utf-8')\nfiles.write_text(a, b)") == []
