"""What is loaded as code from a cache is what this user made: owner, mode and hash are looked at before."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_lora.kernels import native_code
from rl_lora.policy import default_model
from rl_lora.system import cache_folder
from rl_lora.system.cache_folder import not_ours, place_compiler_cache, private_folder
from rl_lora.system.openmp import openmp_library

OTHER = 12345
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="gives files to another user")
with_gcc = pytest.mark.skipif(shutil.which("g++") is None or openmp_library() is None, reason="needs GCC")
Change = Callable[[Path], object]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.answer())


def compiled(folder: Path, number: int) -> bytes:
    """A library that is not ours: it gives another answer."""
    file = folder / "other.cpp"
    file.write_text(f'extern "C" int answer() {{ return {number}; }}\n')
    subprocess.run(["g++", "-shared", "-fPIC", file, "-o", folder / "other.so"], check=True)
    return (folder / "other.so").read_bytes()


@with_gcc
def test_a_library_is_compiled_once_and_nobody_else_can_write_it(home: Path, source: Path) -> None:
    before = os.umask(0)
    try:
        first = native_code.load(source)
    finally:
        os.umask(before)
    assert first is not None
    path = Path(first._name)
    made = path.stat().st_mtime_ns
    for place in (home, home / "rl_lora", path.parent, *path.parent.iterdir()):
        assert place.stat().st_mode & 0o022 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(native_code.load(source)) == 42
    assert path.stat().st_mtime_ns == made


@with_gcc
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.chmod(0o777), "can be written by other users"),
        (lambda path: path.chmod(0o620), "can be written by other users"),
        (lambda path: path.with_suffix(".sha256").chmod(0o606), "can be written by other users"),
        (lambda path: path.with_suffix(".sha256").write_text("0" * 64), "is not what was compiled"),
        pytest.param(lambda path: os.chown(path, OTHER, -1), "belongs to another user", marks=as_root),
        pytest.param(lambda path: os.chown(path.with_suffix(".sha256"), OTHER, -1), "another user", marks=as_root),
    ],
)
def test_a_library_that_others_could_have_changed_is_compiled_anew(
    change: Change, message: str, home: Path, source: Path, tmp_path: Path
) -> None:
    native_code.load(source)
    (path,) = home.rglob("*.so")
    other = compiled(tmp_path, 1)
    path.unlink()
    path.write_bytes(other)  # planted, under a name that this process has not loaded
    path.with_suffix(".sha256").write_text(native_code._hash(path))
    change(path)
    with pytest.warns(UserWarning, match=f"compiled anew: .*{message}"):
        assert answer(native_code.load(source)) == 42
    assert path.read_bytes() != other
    assert not_ours(path) is None


@with_gcc
def test_a_library_whose_bytes_have_changed_is_compiled_anew(home: Path, source: Path, tmp_path: Path) -> None:
    native_code.load(source)
    (path,) = home.rglob("*.so")
    path.unlink()
    path.write_bytes(compiled(tmp_path, 1))
    with pytest.warns(UserWarning, match="is not what was compiled"):
        assert answer(native_code.load(source)) == 42


@with_gcc
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_could_write_into_is_emptied_and_closed(
    mode: int, home: Path, source: Path, tmp_path: Path
) -> None:
    native_code.load(source)
    (path,) = home.rglob("*.so")
    planted = compiled(tmp_path, 1)
    path.unlink()
    path.write_bytes(planted)
    path.with_suffix(".sha256").write_text(native_code._hash(path))
    path.parent.chmod(mode)
    with pytest.warns(UserWarning, match="could be written by other users: what it held is made anew"):
        assert answer(native_code.load(source)) == 42
    assert path.parent.stat().st_mode & 0o022 == 0


@as_root
@with_gcc
@pytest.mark.parametrize("place", ["", "rl_lora", "rl_lora/compiled"])
def test_kernels_in_another_user_s_cache_are_not_loaded(place: str, home: Path, source: Path) -> None:
    native_code.load(source)
    os.chown(home / place, OTHER, -1)
    with pytest.warns(UserWarning, match=r"is not used: .* belongs to another user \(12345\); set XDG_CACHE_HOME"):
        assert native_code.load(source) is None


@with_gcc
def test_a_cache_in_a_folder_that_all_can_write_is_used_only_where_nobody_can_replace_it(
    home: Path, source: Path
) -> None:
    home.mkdir()
    home.chmod(0o1777)  # as /tmp
    assert answer(native_code.load(source)) == 42
    home.chmod(0o777)
    with pytest.warns(UserWarning, match="is not used: .*cache can be written by other users"):
        assert native_code.load(source) is None


def test_what_torch_compiles_is_kept_in_a_folder_of_the_user_s_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    place_compiler_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder == home / "rl_lora" / "inductor"
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "planted.py").touch()
    folder.chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.warns(UserWarning, match="made anew"):
        place_compiler_cache()
    assert not list(folder.iterdir())
    home.chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.warns(UserWarning, match="is not used"):
        place_compiler_cache()
    elsewhere = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert home not in elsewhere.parents
    assert elsewhere.stat().st_mode & 0o077 == 0
    elsewhere.rmdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    place_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_a_link_leads_to_where_the_owner_is_asked(tmp_path: Path, home: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "inner").mkdir(mode=0o700)
    home.mkdir()
    (home / "rl_lora").symlink_to(tmp_path / "open" / "inner")
    with pytest.warns(UserWarning, match="is not used: .*/open can be written by other users"):
        assert private_folder("compiled") is None


@pytest.fixture
def converted(home: Path) -> Path:
    """What looks like a finished conversion of the default model."""
    folder = default_model.default_model_folder()
    cache_folder.make_folder(folder)
    (folder / "source.json").write_text('{"sizes": {}}')
    (folder / "source.json").chmod(0o644)
    return folder


def test_a_default_model_that_others_could_have_changed_is_refused(converted: Path) -> None:
    assert default_model.prepare_default_model() == converted
    (converted / "source.json").chmod(0o666)
    with pytest.raises(ValueError, match=r"may have been changed: .*source.json can be written .*remove that folder"):
        default_model.prepare_default_model()
    (converted / "source.json").chmod(0o664)
    with pytest.warns(UserWarning, match="could be written by its group"):
        default_model.prepare_default_model()
    assert (converted / "source.json").stat().st_mode & 0o777 == 0o644


@as_root
def test_a_default_model_of_another_user_is_refused(converted: Path) -> None:
    for place in (converted / "source.json", converted, converted.parent):
        os.chown(place, OTHER, -1)
        with pytest.raises(ValueError, match=r"belongs to another user \(12345\); remove that folder"):
            default_model.prepare_default_model()
        os.chown(place, 0, -1)


def test_torch_s_own_default_is_no_choice_of_the_user(home: Path) -> None:
    code = """
import os, torch
from torch._inductor.codecache import cache_dir
cache_dir()  # as torch does on import: it writes its default into the environment
from rl_lora.system.cache_folder import place_compiler_cache
place_compiler_cache()
print(cache_dir())
"""
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(home / "rl_lora" / "inductor")
