"""Links in README and docs lead to files that are there, and to headings in them; what they name is there too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rl_lora.scripts.imports import ORDER
from tests.docs.pages import BLOCKS, FENCE, PAGES, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\((?P<to>[^)\s]+)\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|txt|cfg|yaml|cpp))`")
LEFT = ("runs/", "adapter/", "evals/", "checkpoints/")
"""Files of runs, which are not of the project."""


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for match in LINK.finditer(prose_of(page)):
        to, _, anchor = match["to"].partition("#")
        if to.startswith(("http://", "https://")):
            continue
        target = (page.parent / to).resolve() if to else page
        assert target.is_file(), f"{page.name}: {match[0]}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {match[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = [name for name in FILE.findall(prose_of(page)) if not name.startswith(LEFT)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_that_the_code_names_is_there() -> None:
    folders = ("rl_lora", "envs", "rewards", "scripts", "tests", "docs", "recipes")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if "_build" not in path.parts]
    there = {name for path in paths for name in endings(path.relative_to(ROOT))}
    missing: dict[str, str] = {}
    for path in paths:
        if path.suffix in (".py", ".cpp", ".h"):
            named = re.findall(r"`([\w/]+\.(?:py|cpp|h|md|yaml))`", path.read_text(encoding="utf-8"))
            missing |= {str(path.relative_to(ROOT)): name for name in named if name not in there}
    assert missing == {}


def endings(path: Path) -> list[str]:
    """A path and all that it ends with: a/b/c.py, b/c.py, c.py."""
    return ["/".join(path.parts[i:]) for i in range(len(path.parts))]


def test_every_page_is_reached_from_the_readme_or_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.stem for page in PAGES if page.parent == ROOT / "docs"} - {"index"}
    assert {stem for stem in pages if not re.search(rf"^{stem}$", index, re.MULTILINE)} == set()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = {"api", "options", "rooms", "changes", "contributing"}  # pages that only the site has
    assert {stem for stem in pages - made if f"docs/{stem}.md" not in readme} == set()


def test_the_order_of_imports_is_the_one_that_is_kept() -> None:
    [order] = [block.text for block in BLOCKS if block.page.stem == "architecture" and "envs >" in block.text]
    core, beside = order.replace("\n        >", " >").splitlines()
    assert beside == "scripts > envs > rewards"
    lines = [tuple(line.split(", ")) for line in reversed(core.split(" > "))]
    assert lines == [rooms for rooms in ORDER if rooms[0] not in ("rewards", "envs")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tree_of_the_architecture_page_is_the_tree() -> None:
    [tree] = [block.text for block in BLOCKS if block.page.stem == "architecture" and "config.py" in block.text]
    named, above = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        above = above if line.startswith(" ") else name if name == "rl_lora/" else ""
        named.add((above if line.startswith(" ") else "") + name)
    there = {f"{path.relative_to(ROOT)}/" for path in (ROOT / "rl_lora").iterdir() if (path / "__init__.py").is_file()}
    there -= {f"rl_lora/{link}/" for link in ("envs", "rewards", "scripts")}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "rl_lora").glob("*.py")}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert there - named - {"rl_lora/__main__.py"} == set()
