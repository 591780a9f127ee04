"""README and docs, read: their code blocks, with what a page says of each, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`(?P<name>\w+\.\w+)`:\n\n$")
NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^>]+) -->\n$")
NONE_RUN = re.compile(r"<!-- no block of this page is run: (?P<why>[^>]+) -->\n")


@dataclass(frozen=True)
class Block:
    """A fenced block. `file`: the name that the page gives it. `not_run`: why it is not run, where the page says so."""

    page: Path
    line: int
    kind: str
    text: str
    file: str | None
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; directives such as {toctree} are left out."""
    text = page.read_text(encoding="utf-8")
    none_run = NONE_RUN.search(text)
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        file, not_run = FILE.search(before), NOT_RUN.search(before) or none_run
        if not match["kind"].startswith("{"):
            yield Block(
                page,
                before.count("\n") + 1,
                match["kind"],
                match["text"],
                file and file["name"],
                not_run and not_run["why"],
            )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(shell: str) -> Iterator[list[str]]:
    """The words of each command of a shell script without control flow; continued lines are one command."""
    for line in shell.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words
