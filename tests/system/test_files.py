"""A disk that is full or may not be written to: what is there stays good, and the message says where and what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rl_lora.config import EnvConfig, EvaluateConfig, ModelConfig
from rl_lora.evaluation.evaluator import evaluate
from rl_lora.report.folder_page import write_report
from rl_lora.scripts.cli import main
from rl_lora.scripts.command import run
from rl_lora.system.files import FileError, append_text, write_text
from rl_lora.trainer.trainer import train
from tests.tiny import tiny_folder
from tests.trainer.test_trainer import assert_same_run, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(model, tmp_path_factory.mktemp("whole") / "run", checkpoint__every=1))


@contextlib.contextmanager
def failing_disk(number: int, from_call: int = 1) -> Iterator[None]:
    """The operating system refuses to put files on the disk from a call on, but for folders."""
    fsync, calls = os.fsync, itertools.count(1)

    def refuse(descriptor: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}") and next(calls) >= from_call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left in {folder}: {name} could not be written; .* Make room"),
        (errno.EDQUOT, "the disk quota is used up in {folder}: {name}"),
        (errno.EROFS, "{folder}/{name} cannot be written: the file system is read-only; choose another folder"),
        (errno.EACCES, "{folder}/{name} cannot be written: this user may not write in {folder}; allow it, or choose"),
        (errno.EIO, "{folder}/{name} cannot be written: Input/output error"),
    ],
)
def test_what_the_disk_refuses_is_named_with_what_to_do(number: int, message: str, tmp_path: Path) -> None:
    writers: list[Callable[[Path, str], None]] = [write_text, append_text]
    for i, write in enumerate(writers):
        path = tmp_path / f"{i}.jsonl"
        write(path, "before\n")
        with failing_disk(number), pytest.raises(FileError, match=message.format(folder=tmp_path, name=path.name)):
            write(path, "after\n")
        assert path.read_text() == "before\n"
        assert [file.name for file in tmp_path.glob("*.partial")] == []


@pytest.mark.parametrize("from_call", [1, 5, 12, 20, 30])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    from_call: int, model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(model, tmp_path / "run", checkpoint__every=1)
    with failing_disk(errno.ENOSPC, from_call):
        assert run(lambda: train(config)) == 1
    assert f"error: no space left in {tmp_path / 'run'}" in capsys.readouterr().err
    assert_same_run(train(dataclasses.replace(config, resume=True)), whole)


def test_an_evaluation_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        model=ModelConfig(name=str(model), dtype="float32"),
        env=EnvConfig(kwargs={"reward": "tests.tiny_reward:voting"}),
        limit=8,
        max_tokens=3,
        max_rows=1,
        out=str(tmp_path / "out"),
    )
    with failing_disk(errno.ENOSPC, from_call=3):
        assert run(lambda: evaluate(config)) == 1
    said = capsys.readouterr()
    assert f"error: no space left in {tmp_path / 'out'}" in said.err
    assert "samples are in" in said.out
    results = evaluate(config)
    assert 0 < results["n_found"] < 8
    assert results["n_found"] + results["n_drawn"] == 8


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="file systems are mounted by root")
def test_a_file_system_that_is_full_then_larger_then_read_only(
    model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed")
    try:
        config = tiny_config(model, disk / "run", checkpoint__every=1)
        assert run(lambda: train(config)) == 1
        assert f"error: no space left in {disk}" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        config.resume = True
        assert_same_run(train(config), whole)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        config.steps = 5
        assert run(lambda: train(config)) == 2
        assert f"{disk / 'run'} cannot be written to; choose another --run_dir" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["report", str(disk / "run")])
        with pytest.raises(SystemExit, match="1"):
            main("report")
        said = capsys.readouterr().err
        assert "the file system is read-only" in said
        assert "--out FILE writes the page elsewhere" in said
        monkeypatch.setattr(sys, "argv", ["report", str(disk / "run"), "--out", str(tmp_path / "page.html")])
        with pytest.raises(SystemExit, match="0"):
            main("report")
        assert "<html" in (tmp_path / "page.html").read_text()
    finally:
        subprocess.run(["umount", disk], check=False)


def test_an_evaluation_knows_before_the_model_is_loaded_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out .*: .*file is a file; choose another --out"):
        evaluate(EvaluateConfig(out=str(tmp_path / "file" / "out")))


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "eval')
    with pytest.raises(ValueError, match=r"results.json is damaged .*; evaluate again"):
        write_report(tmp_path)


def test_a_damaged_evaluation_file_of_a_run_costs_its_line_only(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "evals" / "step-000004.jsonl"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    write_report(tmp_path / "run")
