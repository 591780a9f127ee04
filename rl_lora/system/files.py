"""Files that are there whole or not at all, whenever the process dies; and errors of the disk that say what to do.

What is written gets a temporary name, reaches the disk, and is renamed. What is removed is renamed first. So whoever
finds a name finds all of it, and what was left half done is known by its name: `clear_left_overs`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

PARTIAL, REMOVED = ".partial", ".removed"
"""A file under way is NAME.partial, a folder under way .partial-NAME..., one that is on its way out .removed-NAME..."""


class FileError(OSError):
    """A file could not be written or removed. The message names it, and says what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here fails in writing or removing `path`, or a part of it. Raises FileError."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, FileError) else error
        if not isinstance(cause, OSError) or cause.errno is None:  # not of the operating system
            raise
        raise FileError(_explained(path, cause)) from cause


def _explained(path: Path, error: OSError) -> str:
    folder, kept = path.parent, "what was there before is as it was"
    if error.errno == errno.ENOSPC:
        return f"no space left in {folder}: {path.name} could not be written; {kept}. Make room, and go on from there"
    if error.errno == errno.EDQUOT:
        return f"the disk quota is used up in {folder}: {path.name} could not be written; {kept}. Make room, and go on"
    if error.errno == errno.EROFS:
        return f"{path} cannot be written: the file system is read-only; choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be written: this user may not write in {folder}; allow it, or choose another folder"
    return f"{path} cannot be written: {error.strerror or error}"


def check_writable(folder: Path, option: str) -> None:
    """Raises ValueError where `folder`, which an option names, cannot be made or written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "is a file" if not there.is_dir() else "cannot be written to"
        raise ValueError(f"{option} {str(folder)!r}: {there} {problem}; choose another --{option}")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Raises FileError."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)  # on a full disk, room for something else
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """As UTF-8; what UTF-8 does not have is replaced. Raises FileError."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def append_text(path: Path, text: str) -> None:
    """The text is on the disk when this returns; where that fails, the file is as it was. Raises FileError."""
    with writing(path), path.open("ab") as file:
        size = file.tell()
        try:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder stays so when the power goes; not every file system can promise it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which takes the place of `folder` at the end, whole. Raises FileError.

    A folder that is there is moved aside first: between the two there is, for a moment, neither.
    """
    partial = folder.with_name(f"{PARTIAL}-{folder.name}-{uuid.uuid4().hex[:8]}")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        old = None
        try:
            yield partial
            sync_folder(partial)
            old = _set_aside(folder) if folder.exists() else None
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old is not None and not folder.exists():
                old.replace(folder)
            raise
        sync_folder(folder.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Half of it is never there under its name. Raises FileError."""
    with writing(folder):
        old = _set_aside(folder)
    shutil.rmtree(old, ignore_errors=True)  # what cannot be deleted now, `clear_left_overs` tries again


def _set_aside(folder: Path) -> Path:
    return folder.rename(folder.with_name(f"{REMOVED}-{folder.name}-{uuid.uuid4().hex[:8]}"))


def clear_left_overs(folder: Path, *names: str) -> None:
    """Delete what a process that died was writing or removing in a folder, under these names (or patterns)."""
    for name in names:
        for mark in (PARTIAL, REMOVED):
            for path in folder.glob(f"{mark}-{name}-*"):
                shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f"{name}{PARTIAL}"):
            with suppress(OSError):
                path.unlink()


def read_json(path: Path, what_to_do: str) -> Any:
    """Raises ValueError for a file that is no JSON, with its name and what to do; FileNotFoundError without a file."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {what_to_do}") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, but for lines that are damaged or being written; none where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def read_yaml(path: Path, what_to_do: str) -> dict[str, Any]:
    """A mapping. Raises ValueError for a file that holds none, with its name and what to do."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); {what_to_do}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (a mapping is expected, it holds {value!r:.60}); {what_to_do}")
    return value


def file_hash(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(folder: Path, who: str, what_to_do: str) -> FileLock:
    """Hold a folder until the lock is released, or this process is gone.

    Raises:
        ValueError: another process holds it; `who` that is, as far as is known.
        FileError: the folder cannot be written to.
    """
    path = folder / ".lock"
    held = FileLock(path, timeout=0)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout as error:  # an OSError too
            raise ValueError(f"{who} is writing to {folder}; {what_to_do}") from error
    return held
