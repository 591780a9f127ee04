"""Every code block of README and docs is run, page by page, in a folder of its own; or the page says why it is not.

Python runs as it stands, on a tiny model. Commands are read by their own parsers, so that a renamed option fails here,
and run on the tiny model in small steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import rl_lora
import rl_lora.envs  # registers the environments
from rl_lora.config import EvalConfig, LogConfig, ModelConfig, RolloutConfig, TrainConfig
from rl_lora.rewards import resolve
from tests.docs.commands import check, run
from tests.docs.pages import BLOCKS, PAGES, ROOT, Block, commands_of
from tests.tiny import tiny_folder

KINDS = {"python", "sh", "yaml", "json", "text"}
DEFAULT_MODELS = ("smollm2-135m-q4", "smollm2-135m")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a tiny model, the demo's run, recipes, a file like GSM8K's."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny_folder(folder, "llama")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    problems = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}\n#### {2 * i}"} for i in range(12)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems), encoding="utf-8")
    config = TrainConfig(
        run_dir=str(folder / "runs" / "demo"),
        steps=2,
        model=ModelConfig(str(model), "float32"),
        rollout=RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=4),
        eval=EvalConfig(episodes=2),
        log=LogConfig(trackers=[]),
    )
    config.checkpoint.every = 1
    rl_lora.train(config)
    return folder


@pytest.fixture(scope="module")
def folders(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A folder for each page, with the files that it shows."""
    places = {}
    for page in PAGES:
        places[page] = tmp_path_factory.mktemp(page.stem)
        shutil.copytree(start, places[page], symlinks=True, dirs_exist_ok=True)
    for block in BLOCKS:
        if block.file:
            (places[block.page] / block.file).write_text(block.text, encoding="utf-8")
    return places


@pytest.fixture(scope="module")
def names() -> dict[Path, dict[str, Any]]:
    """What the Python of each page has defined so far."""
    return {page: {"__name__": page.stem} for page in PAGES}


@pytest.fixture
def place(block: Block, start: Path, folders: dict[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's folder, as the working directory; the default model is a tiny one."""
    folder = folders[block.page]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    defaults = (str(start / "tiny-llama"), "float32", *(ModelConfig.__init__.__defaults__ or ())[2:])
    monkeypatch.setattr(ModelConfig.__init__, "__defaults__", defaults)
    yield folder
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == folder:
            del sys.modules[name]


def of_kind(*kinds: str, run: bool = True) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds and (block.not_run is None) == run]


def test_every_block_says_what_it_is() -> None:
    assert len(BLOCKS) > 60
    assert [str(block) for block in BLOCKS if block.kind not in KINDS] == []
    assert {block.page.name for block in BLOCKS} >= {"README.md", "start.md", "rewards.md", "environments.md"}
    assert all(len(block.not_run) > 10 for block in BLOCKS if block.not_run), "a reason is a sentence"


def test_pages_that_are_followed_in_one_folder_overwrite_no_file_of_each_other() -> None:
    texts: dict[str, set[str]] = {}
    for block in BLOCKS:
        if block.file:
            texts.setdefault(block.file, set()).add(block.text)
    assert {name for name, found in texts.items() if len(found) > 1} == set()


@pytest.mark.parametrize("block", of_kind("python", "sh"), ids=str)
def test_a_block_runs(block: Block, place: Path, start: Path, names: dict[Path, dict[str, Any]]) -> None:
    if block.kind == "sh":
        for words in commands_of(block.text):
            if "rl_lora/ReasoningGym-v0" in words:
                pytest.importorskip("reasoning_gym")
            run(words, start / "tiny-llama", start / "gsm8k.jsonl")
    else:
        code = compiled(block, start)
        if block.file is None:  # a module runs where it is imported
            exec(code, names[block.page])


@pytest.mark.parametrize("block", of_kind("python", "sh", run=False), ids=str)
def test_a_block_that_is_not_run_can_be_read(block: Block, place: Path, start: Path) -> None:
    if block.kind == "sh":
        for words in commands_of(block.text):
            check(words)
    else:
        compiled(block, start)


def compiled(block: Block, start: Path) -> Any:
    text = block.text
    for model in DEFAULT_MODELS:
        text = text.replace(f'"{model}"', repr(str(start / "tiny-llama")))
    return compile("\n" * block.line + text, str(block.page), "exec")


@pytest.mark.parametrize("block", of_kind("json"), ids=str)
def test_json_is_json_lines(block: Block) -> None:
    assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_yaml_is_settings(block: Block, place: Path) -> None:
    from rl_lora.scripts.options import parse

    (place / "block.yaml").write_text(block.text, encoding="utf-8")
    config = parse(TrainConfig, ["--config", "block.yaml"])
    assert yaml.safe_load(block.text)
    resolve(config.env.kwargs["reward"])


def test_the_page_of_the_run_folder_names_every_file_and_every_field(start: Path) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    files = {f"{path.name}/" if path.is_dir() else path.name for path in (start / "runs" / "demo").glob("[!.]*")}
    assert {name for name in files if f"`{name}`" not in page} == set()
    lines = (start / "runs" / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    fields = {name for line in lines for name in json.loads(line) if not name.startswith(("seconds/", "parts/"))}
    assert {name for name in fields if f"`{name}`" not in page} == set()
