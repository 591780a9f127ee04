"""OpenMP, whose threads compute on a CPU: which library it is."""

from __future__ import annotations

from pathlib import Path


def openmp_library() -> str | None:
    """Where torch's own threads come from, if that is GNU's library: others would wait beside them, spinning."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:  # no Linux
        return None
    places = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line}
    of_torch = [place for place in places if "/torch/" in place or "/torch.libs/" in place]
    return min(of_torch or places, default=None)
