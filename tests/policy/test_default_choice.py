"""Which model the default name stands for: the hub's where it can be had, else the embedded one, the same each time.

The hub is an HTTP server on this machine that holds a tiny model by the default one's name.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rl_lora.config import EvaluateConfig, ModelConfig, TrainConfig
from rl_lora.evaluation.evaluator import evaluate
from rl_lora.lora.peft_io import base_of, load_adapter, save_adapter
from rl_lora.policy import default_choice
from rl_lora.policy.default_choice import settled
from rl_lora.policy.loading import resolve_model
from rl_lora.policy.policy import Policy
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL
from rl_lora.trainer.run_folder import check_run_dir, with_base
from rl_lora.trainer.trainer import train
from tests.tiny import randomize, tiny_folder
from tests.trainer.test_trainer import tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download of the model takes; `asked` counts requests."""

    asked = 0

    def __init__(self, folder: Path, silent: bool, *args: object):
        self.folder, self.silent = folder, silent
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        Hub.asked += 1
        if self.silent:
            time.sleep(5)
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/"):
            names = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self.answer(json.dumps({"id": HUB_MODEL, "sha": COMMIT, "siblings": names}).encode(), name)
        elif (self.folder / name).is_file() and path.startswith(f"/{HUB_MODEL}/resolve/"):
            self.answer((self.folder / name).read_bytes(), name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, body: bytes, name: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if name.startswith("{") else "application/octet-stream")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What stands for the hub's model, and for the embedded one: of another seed."""
    hub, embedded = (tmp_path_factory.mktemp(name) for name in ("hub", "embedded"))
    return tiny_folder(hub, "llama", seed=0), tiny_folder(embedded, "llama", seed=1)


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Where the hub is, as HF_ENDPOINT says at the beginning of a process."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def machine(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has fetched nothing yet and has no network; what is written down of the choice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    point_at(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("rl_lora.policy.loading.prepare_default_model", lambda: models[1])
    return tmp_path / "cache" / "rl_lora" / "models" / f"{DEFAULT_MODEL}.json"


@pytest.fixture
def hub(
    models: tuple[Path, Path], machine: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """The machine with a hub; one that is silent where the test says so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, models[0], getattr(request, "param", False)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    Hub.asked = 0
    yield
    server.shutdown()
    server.server_close()


def test_where_the_hub_answers_the_default_is_its_model_in_full_precision(hub: None, machine: Path) -> None:
    assert settled(DEFAULT_MODEL) == HUB_MODEL
    assert json.loads(machine.read_text())["revision"] == COMMIT
    folder = Path(resolve_model(DEFAULT_MODEL))
    assert folder.name == COMMIT
    assert resolve_model(HUB_MODEL) == str(folder)
    policy = Policy.load(dtype="float32")
    assert policy.name == HUB_MODEL
    assert policy.remarks(policy.bank.add("a")) == []


def test_the_choice_stays_and_needs_the_hub_no_more(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(DEFAULT_MODEL)
    point_at(monkeypatch, "http://127.0.0.1:9")
    Hub.asked = 0
    assert resolve_model(DEFAULT_MODEL) == folder
    Policy.load(dtype="float32")
    assert Hub.asked == 0


def test_without_a_hub_the_default_is_the_embedded_model_and_stays_so(
    models: tuple[Path, Path], machine: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    start = time.monotonic()
    assert settled(DEFAULT_MODEL) == EMBEDDED_MODEL
    assert time.monotonic() - start < 3
    request.getfixturevalue("hub")
    assert settled(DEFAULT_MODEL) == EMBEDDED_MODEL
    assert resolve_model(DEFAULT_MODEL) == resolve_model(EMBEDDED_MODEL) == str(models[1])
    assert Hub.asked == 0
    policy = Policy.load(dtype="float32")
    assert policy.name == EMBEDDED_MODEL
    assert "4-bit file (GGUF Q4_1)" in policy.remarks(policy.bank.add("a"))[0]


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_hub_that_does_not_answer_costs_two_seconds(hub: None) -> None:
    start = time.monotonic()
    assert settled(DEFAULT_MODEL) == EMBEDDED_MODEL
    assert time.monotonic() - start < 3


def test_offline_the_hub_is_not_asked_and_its_cache_is(
    hub: None, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert settled(DEFAULT_MODEL) == EMBEDDED_MODEL
    assert Hub.asked == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    machine.unlink()
    assert settled(DEFAULT_MODEL) == HUB_MODEL
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    machine.unlink()
    asked = Hub.asked
    assert settled(DEFAULT_MODEL) == HUB_MODEL
    assert Hub.asked == asked


def test_a_download_that_fails_leaves_the_embedded_model(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_choice, "NEEDED", ("config.json", "missing.safetensors"))
    assert settled(DEFAULT_MODEL) == EMBEDDED_MODEL


def test_an_adapter_names_a_base_that_others_can_load_and_still_the_one_it_is_for(
    machine: Path, tmp_path: Path
) -> None:
    policy = Policy.load(EMBEDDED_MODEL, dtype="float32")
    adapter = randomize(policy.bank.add("a"), 0)
    for name in (EMBEDDED_MODEL, HUB_MODEL, "org/other"):
        folder = save_adapter(adapter, tmp_path / name.replace("/", "-"), name)
        public = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert public == ("org/other" if name == "org/other" else "HuggingFaceTB/SmolLM2-135M-Instruct")
        assert base_of(folder) == name


def older_adapter(folder: Path, policy: Policy) -> Path:
    """As it was written before the embedded model had a name of its own."""
    save_adapter(randomize(policy.bank.add("older"), 0), folder, policy.name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": DEFAULT_MODEL}))
    return folder


def test_an_adapter_from_before_is_for_the_embedded_model(machine: Path, tmp_path: Path) -> None:
    policy = Policy.load(EMBEDDED_MODEL, dtype="float32")
    folder = older_adapter(tmp_path / "older", policy)
    assert base_of(folder) == EMBEDDED_MODEL
    assert load_adapter(folder, policy.bank, "again").hash() == policy.bank["older"].hash()


def default_run(tmp_path: Path, **changes: object) -> TrainConfig:
    config = tiny_config(tmp_path / "unused", tmp_path / "run")
    return replace(config, model=replace(config.model, name=DEFAULT_MODEL), **changes)  # type: ignore[arg-type]


def test_a_run_writes_down_its_base_and_goes_on_with_it_and_is_evaluated_on_it(
    machine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Though the machine has come to a hub since, and the default name stands for its model."""
    run_dir = train(default_run(tmp_path, steps=1))
    assert f"name: {EMBEDDED_MODEL}\n" in (run_dir / "config.yaml").read_text()
    assert "this base is HuggingFaceTB/SmolLM2-135M-Instruct from a 4-bit file" in capsys.readouterr().out
    machine.unlink()
    request.getfixturevalue("hub")
    assert settled(DEFAULT_MODEL) == HUB_MODEL
    resumed = default_run(tmp_path, steps=2, resume=True)
    assert with_base(resumed).model.name == EMBEDDED_MODEL
    check_run_dir(with_base(resumed))
    with pytest.raises(ValueError, match=f"model.name: {EMBEDDED_MODEL} -> {HUB_MODEL}"):
        check_run_dir(replace(resumed, model=replace(resumed.model, name=HUB_MODEL)))
    started = replace(
        resumed, run_dir=str(tmp_path / "other"), adapter=replace(resumed.adapter, init_from=str(run_dir / "adapter"))
    )
    assert with_base(started).model.name == EMBEDDED_MODEL
    options = {"env": resumed.env, "limit": 2, "max_tokens": 2, "out": str(tmp_path / "evaluation")}
    model = ModelConfig(dtype="float32")
    results = evaluate(EvaluateConfig(adapters=[str(run_dir)], model=model, **options))  # type: ignore[arg-type]
    assert results["config"]["model"]["name"] == EMBEDDED_MODEL
    assert "was made for" not in capsys.readouterr().out
    evaluate(EvaluateConfig(adapters=[str(run_dir)], model=replace(model, name=HUB_MODEL), **options))  # type: ignore[arg-type]
    assert f"was made for {EMBEDDED_MODEL}, and is evaluated on {HUB_MODEL}" in capsys.readouterr().out


def test_a_run_from_before_goes_on_with_the_embedded_model(hub: None, tmp_path: Path) -> None:
    config = default_run(tmp_path)
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(f"model: {{name: {DEFAULT_MODEL}, dtype: float32}}\n")
    assert with_base(replace(config, resume=True)).model.name == EMBEDDED_MODEL
    assert with_base(config).model.name == HUB_MODEL
