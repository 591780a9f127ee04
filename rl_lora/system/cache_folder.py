"""Where things that were made once are kept for all runs of a user, and whether nobody else could have changed them."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rl_lora`, by default `~/.cache/rl_lora`; it may not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"  # the standard: relative values are ignored
    return cache / "rl_lora"


def not_ours(path: Path, above: bool = True) -> str | None:
    """Why another user could have written what is at `path`, or None: its owner and mode, and those of folders above.

    The system's administrator is trusted; so are folders such as /tmp, in which nobody can touch what is another's.
    """
    if os.name != "posix":
        return None
    path = path.resolve()
    for place in (path, *(path.parents if above else ())):
        if not place.exists():
            continue
        status, me = place.stat(), os.geteuid()
        if status.st_uid not in (me, 0):
            return f"{place} belongs to another user ({status.st_uid})"
        if not status.st_mode & WRITABLE or (place != path and status.st_mode & stat.S_ISVTX):
            continue
        alone = not status.st_mode & stat.S_IWOTH and status.st_gid == status.st_uid == me != 0  # a group of one's own
        if not (alone and place != path):
            return f"{place} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def make_folder(folder: Path) -> None:
    """Like `mkdir -p`, with folders that are their owner's alone, whatever the umask."""
    for place in (*reversed(folder.parents), folder):
        place.mkdir(mode=0o700, exist_ok=True)


def close(place: Path) -> bool:
    """Take from others the right to write to a file or folder of this user; whether they had it."""
    status = place.stat()
    if os.name != "posix" or status.st_uid != os.geteuid() or not status.st_mode & WRITABLE:
        return False
    place.chmod(stat.S_IMODE(status.st_mode) & ~WRITABLE)
    return True


def private_folder(name: str) -> Path | None:
    """A folder of the cache in which only this user writes, made if need be; None, with a warning, where it cannot be.

    One that others could write into is emptied: it is for what can be made again.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_folder() / name
    make_folder(folder)
    close(cache_folder())
    if close(folder):
        warnings.warn(f"{folder} could be written by other users: what it held is made anew", stacklevel=3)
        shutil.rmtree(folder)
        make_folder(folder)
    if reason := not_ours(folder):
        warnings.warn(
            f"what is in {folder} is not used: {reason}; set XDG_CACHE_HOME to a folder of yours", stacklevel=3
        )
        return None
    return folder.resolve()


def place_compiler_cache() -> None:
    """Have torch's compiler keep what it makes, and loads as code, in a folder of the user's own.

    By default it is one in /tmp whose name anybody can foresee. A folder that the environment names is left as it is.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # torch writes it there
        try:
            folder = private_folder("inductor")
        except OSError:  # nowhere to keep it
            folder = None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder or tempfile.mkdtemp(prefix="rl_lora-inductor-"))
