"""The drawing of the package's imports as a list: rooms by floor, circles, and imports that run upwards.

`python scripts/imports.py` draws this tree; `--commit 7c6a489` draws the tree of another commit, to compare. A room is
a folder of `rl_lora/`, or a file beside them. Every import counts, also under TYPE_CHECKING and inside functions.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rl_lora"
BESIDE = ("envs", "rewards", "scripts")
ORDER: tuple[tuple[str, ...], ...] = (
    ("types",),
    ("system",),
    ("algorithms",),
    ("config",),
    ("settings",),
    ("kernels", "metrics"),
    ("attention", "lora", "report"),
    ("policy",),
    ("learner", "sampler"),
    ("rollout",),
    ("trainer",),
    ("evaluation",),
    ("rewards",),
    ("envs",),
    ("scripts",),
)
"""From the ground up: a room imports from lower lines only, and never from another room of its own line."""
ALLOWED = {"rewards": {"system"}, "envs": {"rewards", "system"}}
"""Rooms that know less of the core than stands below them."""
Graph = Mapping[str, Mapping[str, set[str]]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted names, without `rl_lora.`, and files of all modules; the package's face, `__init__`, is none."""
    found = {}
    for folder in (PACKAGE, *BESIDE):
        for path in sorted((root / folder).rglob("*.py")):
            if (
                any(part in BESIDE for part in path.relative_to(root).parts[1:])
                or path == root / PACKAGE / "__init__.py"
            ):
                continue  # a link to what stands beside
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[1:] if folder == PACKAGE else parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> dict[str, dict[str, set[str]]]:
    """Each module, the modules that it imports, and the names that it takes from them."""
    files = modules(root)
    graph: dict[str, dict[str, set[str]]] = {name: {} for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                pairs = [(f"{node.module}.{alias.name}", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                pairs = [(f"{alias.name}.", alias.name) for alias in node.names]
            else:
                continue
            for full, taken in pairs:
                if full.partition(".")[0] not in (PACKAGE, *BESIDE):
                    continue
                whole, holder = full.removeprefix(f"{PACKAGE}."), full.rpartition(".")[0].removeprefix(f"{PACKAGE}.")
                target = whole if whole in files else holder
                if target in files and target != name:
                    graph[name].setdefault(target, set()).add(taken)
    return graph


def room(module: str) -> str:
    """The folder that a module stands in, or the module itself; `python -m rl_lora` is one of the commands."""
    return module.partition(".")[0].replace("__main__", "scripts")


def rooms(graph: Graph) -> dict[str, dict[str, set[str]]]:
    """The same graph of rooms."""
    found: dict[str, dict[str, set[str]]] = {room(name): {} for name in graph}
    for name, targets in graph.items():
        for target in targets:
            if room(target) != room(name):
                found[room(name)].setdefault(room(target), set()).add(f"{name} -> {target}")
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(circle := stack[at:]) > 1:
                found.append(sorted(circle))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(found)


def floors(graph: Graph) -> dict[str, int]:
    """Each node stands above all that it imports; 1 is the ground. A circle stands on one floor."""
    circle_of = {name: tuple(circle) for circle in circles(graph) for name in circle}
    known: dict[tuple[str, ...], int] = {}

    def floor(names: tuple[str, ...]) -> int:
        if names not in known:
            below = {circle_of.get(target, (target,)) for name in names for target in graph[name]} - {names}
            known[names] = 1 + max(map(floor, below), default=0)
        return known[names]

    return {name: floor(circle_of.get(name, (name,))) for name in graph}


def upward(graph: Graph) -> list[str]:
    """Imports against `ORDER`, one a line."""
    line = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = []
    for name, targets in graph.items():
        for target in targets:
            here, there = room(name), room(target)
            if here == there:
                continue
            below = line.get(there, -1) < line.get(here, -1)
            if not below or there not in ALLOWED.get(here, {there}):
                wrong.append(f"{name} -> {target}: {', '.join(sorted(targets[target]))}")
    return sorted(wrong)


def drawing(graph: Graph) -> Iterable[str]:
    """The drawing, line by line."""
    core = {name: targets for name, targets in rooms(graph).items() if name not in BESIDE}
    core = {name: {t: n for t, n in targets.items() if t in core} for name, targets in core.items()}
    by_floor = floors(core)
    for floor in sorted(set(by_floor.values()), reverse=True):
        for name in sorted(name for name, at in by_floor.items() if at == floor):
            yield f"floor {floor:2}  {name:12} -> {', '.join(sorted(core[name]))}".rstrip(" ->")
    files = {
        name: {t: n for t, n in targets.items() if room(t) in core}
        for name, targets in graph.items()
        if room(name) in core
    }
    found, against = circles(graph), upward(graph)
    yield f"{len(core)} rooms on {max(by_floor.values())} floors, {len(files)} files on {max(floors(files).values())}"
    yield f"circles of files: {len(found)}"
    yield from (f"  {', '.join(circle)}" for circle in found)
    yield f"circles of rooms: {len(circles(core))}"
    if {name for names in ORDER for name in names} >= set(core):
        yield f"imports that run upwards: {len(against)}"
        yield from (f"  {line}" for line in against)


def tree_of(commit: str, folder: Path) -> Path:
    """The files of another commit, in a folder."""
    archive = subprocess.run(["git", "archive", commit, PACKAGE, *BESIDE], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"cannot read commit {commit!r}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the imports of the package as a list.")
    parser.add_argument("--commit", help="the commit to draw; by default the working tree")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        for line in drawing(imports(tree_of(commit, Path(folder)) if commit else ROOT)):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
