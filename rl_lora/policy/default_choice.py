"""Which model the default name stands for on this machine: the hub's where it can be fetched, else the embedded one.

It is decided once and written down, so that a run, its continuation and its evaluation have the same base. Left out:
fetching the embedded model (`default_model.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from rl_lora.policy.default_model import console
from rl_lora.system.cache_folder import cache_folder
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL, canonical

NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
USEFUL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SECONDS = 2.0
"""Seconds that the hub may take to answer."""


def settled(name: str, wanted: Iterable[str] = ()) -> str:
    """The model that a name stands for: for the default name the embedded or the hub's, any other is itself.

    wanted: bases of adapters or runs that exist already. The default name follows them where they agree and their base
    is there; else it is the model that was decided for on this machine, now if not before.

    Raises:
        ValueError: the decision cannot be written down.
    """
    if name != DEFAULT_MODEL:
        return name
    bases = {canonical(base) for base in wanted} & {EMBEDDED_MODEL, HUB_MODEL}
    if bases == {EMBEDDED_MODEL} or (bases == {HUB_MODEL} and hub_folder() is not None):
        return bases.pop()
    return _decision().model


def hub_folder() -> Path | None:
    """The folder of the hub's model in the hub's cache, of the revision that was decided for; None if not there."""
    decided = _written()
    return _cached(decided.revision if decided else None)


@dataclasses.dataclass(frozen=True)
class _Decision:
    model: str
    revision: str | None
    """Of the hub's model."""
    reason: str


def _decision() -> _Decision:
    record = _record()
    if (decided := _written()) is not None:
        return decided
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{record}.lock"):
            if (decided := _written()) is None:
                decided = _decide()
                draft = record.with_name(f"{record.name}.tmp-{os.getpid()}")
                draft.write_text(json.dumps(dataclasses.asdict(decided), indent=1) + "\n", encoding="utf-8")
                os.replace(draft, record)
                if decided.model == EMBEDDED_MODEL:
                    console.print(
                        f"{DEFAULT_MODEL}: {decided.reason}, so on this machine it is {EMBEDDED_MODEL} from now on, "
                        f"from a 4-bit file; --model.name {HUB_MODEL} is the full-precision model ({record} says so)"
                    )
    except OSError as error:
        raise ValueError(
            f"cannot write down what {DEFAULT_MODEL} is in {record.parent}: {error}; it must be writable "
            f"(XDG_CACHE_HOME moves it), or name {EMBEDDED_MODEL} or {HUB_MODEL}"
        ) from error
    return decided


def _record() -> Path:
    return cache_folder() / "models" / f"{DEFAULT_MODEL}.json"


def _written() -> _Decision | None:
    try:
        decided = _Decision(**json.loads(_record().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or none that can be read: it is decided anew
        return None
    return decided if decided.model in (EMBEDDED_MODEL, HUB_MODEL) else None


def _decide() -> _Decision:
    if (folder := _cached(None)) is not None:
        return _Decision(HUB_MODEL, folder.name, "it is in the hub's cache")
    if constants.HF_HUB_OFFLINE:
        return _Decision(EMBEDDED_MODEL, None, "HF_HUB_OFFLINE is set")
    if not _hub_answers():
        return _Decision(EMBEDDED_MODEL, None, f"the hub does not answer in {SECONDS:g} s")
    console.print(f"{DEFAULT_MODEL}: fetching {HUB_MODEL} (270 MB)")
    try:
        revision = Path(hf_hub_download(HUB_MODEL, NEEDED[0])).parent.name
        for file in (*NEEDED, *USEFUL):
            with suppress(*(() if file in NEEDED else (EntryNotFoundError,))):
                hf_hub_download(HUB_MODEL, file, revision=revision)
    except Exception as error:  # whatever is between here and the hub
        return _Decision(EMBEDDED_MODEL, None, f"{HUB_MODEL} cannot be fetched ({type(error).__name__}: {error})")
    return _Decision(HUB_MODEL, revision, "the hub has it")


def _cached(revision: str | None) -> Path | None:
    found = [try_to_load_from_cache(HUB_MODEL, file, revision=revision) for file in NEEDED]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None  # type: ignore[arg-type]


def _hub_answers() -> bool:
    """Whether the hub says in time that it has the model. In a thread, since looking up a name has no limit of its own
    where there is no network."""
    found: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # no network, a proxy that says no, an answer that is none
            found.append(HfApi().model_info(HUB_MODEL, timeout=SECONDS))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(found)
