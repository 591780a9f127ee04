"""The package as it is installed elsewhere: a wheel of `rl_lora` alone, beside a stranger's modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.tiny import tiny_folder

SOURCES = ("rl_lora", "envs", "rewards", "scripts")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist with setuptools alone, which asks no network for anything."""
    run(sys.executable, "-c", BUILD, kind, target, cwd=source)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clone as `git archive` would write it, links and all, and what the build of an earlier version left in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for stale in ("build/lib/envs/text.py", "build/lib/rl_lora/attention.py"):
        (folder / stale).parent.mkdir(parents=True)
        (folder / stale).touch()
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_holds_the_whole_package_and_nothing_beside_it(wheel: Path) -> None:
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    parts = [(folder, "" if folder == "rl_lora" else "rl_lora/") for folder in SOURCES]
    expected = {
        prefix + path.relative_to(ROOT).as_posix()
        for folder, prefix in parts
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".typed", ".html", ".css", ".js") and "__pycache__" not in path.parts
    }
    assert names == expected
    for file in ("kernels/vectors.h", "report/page_assets/page.html", "py.typed", "rewards/math/verdict.py"):
        assert f"rl_lora/{file}" in names


def test_an_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "tests").exists()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh virtual environment with the wheel; what it depends on is lent from outside."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    places = {"base": str(folder), "platbase": str(folder)}
    library = Path(sysconfig.get_path("purelib", "venv", places))
    lent = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (library / "lent.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
    commands = Path(sysconfig.get_path("scripts", "venv", places))
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", commands / "python", *install, wheel, cwd=folder)
    assert sorted(path.name for path in library.iterdir() if "." not in path.name) == ["rl_lora"]
    return commands


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder somewhere else whose modules have the names of our folders, with a reward and an environment."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "envs.py").write_text('OWNER = "a stranger"\n', encoding="utf-8")
    for name in ("rewards", "scripts", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('OWNER = "a stranger"\n', encoding="utf-8")
    (folder / "rewards" / "length.py").write_text(
        "def parity(completion):\n    return float(len(completion) % 2)\n", encoding="utf-8"
    )
    (folder / "my_rewards.py").write_text(
        "from rl_lora.rewards import Score\n\n\ndef f(completion, reference):\n"
        "    return Score(float(len(completion)), success=reference in completion)\n",
        encoding="utf-8",
    )
    (folder / "my_env.py").write_text(
        "import gymnasium as gym\n\nfrom rl_lora.envs import Problem, SingleTurnEnv\n\n\n"
        "class Guess(SingleTurnEnv):\n    def __init__(self):\n"
        "        super().__init__(lambda completion, reference: float(completion.count(reference)))\n\n"
        "    def problem(self, seed):\n        return Problem(f'Guess number {seed}.', str(seed % 10))\n\n\n"
        "gym.register('Guess-v0', Guess)\n",
        encoding="utf-8",
    )
    rows = (json.dumps({"prompt": f"2 + {i}", "answer": str(2 + i)}) for i in range(40))
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return folder


def test_a_strangers_modules_keep_their_names(installed: Path, stranger: Path) -> None:
    code = (
        "import envs, rewards, scripts, tests, gymnasium, rl_lora.envs, rl_lora.rewards.math.verdict\n"
        "assert {module.OWNER for module in (envs, rewards, scripts, tests)} == {'a stranger'}\n"
        "print(gymnasium.make('rl_lora/Arithmetic-v0').reset(seed=1)[0]); print(rl_lora.__file__)"
    )
    said, place = run(installed / "python", "-c", code, cwd=stranger).splitlines()
    assert said == "What is 52 + 56? Reply with just the number."
    assert Path(place).is_relative_to(installed.parent)
    assert "train" in run(installed / "rl-lora", "--help", cwd=stranger)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        ("--env.id", "my_env:Guess-v0"),
        *(
            ("--env.id", "rl_lora/Prompts-v0", "--env.kwargs.path", "rows.jsonl", "--env.kwargs.reward", reward)
            for reward in ("my_rewards:f", "rewards.length:parity", "math")
        ),
    ],
    ids=lambda task: task[-1],
)
def test_a_stranger_trains_evaluates_and_reports(
    task: tuple[str, ...], installed: Path, stranger: Path, tmp_path: Path
) -> None:
    def command(name: str, *options: str | Path) -> str:
        return run(installed / "rl-lora", name, *options, cwd=stranger)

    model, run_dir, evaluation = tiny_folder(tmp_path, "llama"), tmp_path / "run", tmp_path / "evaluation"
    small = ("--rollout.prompts_per_step", "2", "--rollout.group_size", "2", "--rollout.max_tokens", "4")
    rest = ("--steps", "2", "--eval.episodes", "4", "--model.compile", "false")
    said = command("train", "--model.name", model, "--run_dir", run_dir, *task, *small, *rest)
    assert "2 steps in" in said
    assert "reward 0.000" not in said or "my_rewards:f" not in task
    command("evaluate", run_dir, "--limit", "4", "--out", evaluation)
    assert len((evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()) > 0
    (run_dir / "report.html").unlink()
    command("report", run_dir, evaluation)
    assert (run_dir / "report.html").is_file()
    if "my_rewards:f" in task or "math" in task:  # the others give no verdict
        command("plot", run_dir, "--out", tmp_path / "accuracy.png")
        assert (tmp_path / "accuracy.png").is_file()
