"""An adapter folder may come from anybody: whatever is in its files, it loads right or is refused by file and field."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lora.lora.adapter import Adapter, Site
from rl_lora.lora.adapter_config import resolve_patterns
from rl_lora.lora.bank import AdapterBank
from rl_lora.lora.peft_io import check_adapter, load_adapter, save_adapter
from tests.tiny import randomize, tiny_model

Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
NAMES = [
    f"model.layers.{i}.{leaf}"
    for i in (0, 1, 11)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.gate_up_proj")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter on one layer of the tiny Llama."""
    adapter = Adapter("a", [Site(Q, 48, 64)], rank=2)
    return save_adapter(randomize(adapter, 0), tmp_path / "a", "org/tiny")


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(folder: Path, changed: Mapping[str, Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **changed}, file, metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    """Within seconds, without a model, with the file's name, and nothing in the message that a terminal obeys."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as raised:
        check_adapter(folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert str(raised.value).isprintable()
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["self_attn.q_proj", "q_proj"],
        ["proj", "up_proj"],  # no dotted end: matches nothing
        ["layers.1.self_attn.k_proj", "k_proj"],
        ["layers.1", "1.mlp.up_proj"],
        ["mlp.......proj"],  # a dot stands for any character
        [NAMES[0], NAMES[5]],
        [r".*\.gate_up_proj"],
        [r".*\.experts\.gate_up_proj", "gate_up_proj"],
        [r"layers\.1\.self_attn\.(q|k)_proj", "k_proj"],
        [r"layers\.\d+\.mlp.*", "q_proj"],
        [r"layers\.[01]\..*", ".*"],
        [r"^model\.layers\.(?!0)\d+\..*_proj$"],
        [r"q_proj|k_proj"],
        [r"(?P<a>q)_proj", "up_proj"],
        [r".*(self_attn).*", "mlp.*"],
        ["", "q_proj"],
    ],
)
def test_patterns_mean_what_they_mean_to_peft(patterns: list[str], tmp_path: Path) -> None:
    values = {pattern: i for i, pattern in enumerate(patterns)}
    expected = [values.get(get_pattern_key(patterns, name), -1) for name in NAMES]
    assert resolve_patterns(values, NAMES, -1, tmp_path, "rank_pattern") == expected


@pytest.mark.parametrize(
    ("field", "pattern"),
    [("rank_pattern", "(.*.*)*="), ("rank_pattern", r"(\w*\w*\.?)*!"), ("alpha_pattern", "((.|..)*)*X")],
)
def test_a_pattern_that_would_be_matched_for_years_is_refused(folder: Path, field: str, pattern: str) -> None:
    configure(folder, **{field: {pattern: 2}})
    refused(folder, f"{field}: matching its patterns takes too long")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(q_proj", r"rank_pattern: \(q_proj is not a regular expression: missing \)"),
        ("[", "is not a regular expression"),
        ("(?P<a>q)(?P<a>k)", "redefinition of group name"),
        ("*", "nothing to repeat"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("(" * 500 + ")" * 499, "is not a regular expression"),
        ("\x1b]0;title\x07(", r"\\x1b\]0;title\\x07\(. is not a regular expression"),
        ("q" * 1001, "rank_pattern may hold at most"),
    ],
)
def test_a_pattern_that_is_none_is_refused(folder: Path, pattern: str, message: str) -> None:
    configure(folder, rank_pattern={pattern: 2})
    refused(folder, message)


def test_thousands_of_patterns_are_read_quickly(folder: Path) -> None:
    configure(folder, rank_pattern={f"layers.{i}.mlp.up_proj": 2 for i in range(9999)} | {"q_proj": 2}, r=8)
    start = time.process_time()
    adapter = load_adapter(folder, AdapterBank(tiny_model("llama")))
    assert adapter.ranks == {Q: 2}
    assert time.process_time() - start < 5
    configure(folder, rank_pattern={f"layers.{i}.mlp.up_proj": 2 for i in range(20000)})
    refused(folder, "rank_pattern may hold at most 10,000 patterns")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"r": 1e999', "r must be at most 65,536, got inf"),
        ('"r": Infinity', "Infinity is no number of JSON"),
        ('"r": NaN', "NaN is no number of JSON"),
        ('"r": true', "r must be a number > 0, got True"),
        ('"r": "2"', "r must be a number > 0, got '2'"),
        ('"r": 2.5', "r must be a whole number, got 2.5"),
        ('"r": [2]', r"r must be a number > 0, got \[2\]"),
        ('"r": 100000', "r must be at most 65,536, got 100000"),
        (f'"r": 1{"0" * 400}', "r must be at most 65,536, got 1000"),
        (f'"r": 1{"0" * 5000}', "is not valid JSON"),
        ('"lora_alpha": 1e999', "lora_alpha must be at most 1,000,000, got inf"),
        ('"lora_alpha": -Infinity', "-Infinity is no number of JSON"),
        ('"lora_alpha": 1e30', r"lora_alpha must be at most 1,000,000, got 1e\+30"),
        ('"lora_alpha": false', "lora_alpha must be a number > 0, got False"),
        ('"rank_pattern": {"q_proj": 1e999}', "rank_pattern: q_proj must be at most 65,536, got inf"),
        ('"rank_pattern": {"q_proj": true}', "rank_pattern: q_proj must be a number > 0, got True"),
        ('"rank_pattern": {"q_proj": null}', "rank_pattern: q_proj must be a number > 0, got None"),
        ('"alpha_pattern": {"q_proj": 1e999}', "alpha_pattern: q_proj must be at most 1,000,000, got inf"),
        ('"alpha_pattern": {"q_proj": {}}', "alpha_pattern: q_proj must be a number > 0, got {}"),
        ('"alpha_pattern": {"\\u001b[2J": 0}', r"alpha_pattern: '\\x1b\[2J' must be a number > 0"),
        ('"rank_pattern": [2]', r"rank_pattern must be a mapping of names to numbers, got \[2\]"),
        ('"rank_pattern": "q_proj"', "rank_pattern must be a mapping"),
        ('"target_modules": 7', "target_modules must be a text or a list of texts, got 7"),
        ('"target_modules": ["q_proj", 3]', "target_modules must be a text or a list of texts"),
        ('"target_modules": {"q_proj": 1}', "target_modules must be a text or a list of texts"),
        ('"target_parameters": "experts.down_proj"', "target_parameters must be a list of texts"),
        ('"target_parameters": [null]', "target_parameters must be a list of texts"),
        ('"layers_to_transform": "1"', "layers_to_transform must be a whole number or a list"),
        ('"use_rslora": "yes"', "use_rslora must be true or false, got 'yes'"),
        ('"fan_in_fan_out": 1', "fan_in_fan_out must be true or false, got 1"),
        ('"lora_dropout": "0.1"', "lora_dropout must be a number from 0 to 1"),
        ('"lora_dropout": 1.5', "lora_dropout must be a number from 0 to 1, got 1.5"),
        ('"base_model_name_or_path": ["a"]', "base_model_name_or_path must be a text"),
        ('"init_lora_weights": [1]', "init_lora_weights must be true, false or a text"),
        ('"peft_type": ["LORA"]', r"peft_type is \['LORA'\]; only LORA"),
        ('"r": 2, "r": 2', "it has r twice"),
        ('"alpha_pattern": {"q_proj": 1, "q_proj": 2}', "it has q_proj twice"),
        (f'"corda_config": {"[" * 100_000}{"]" * 100_000}', "it is nested too deep"),
        ('"\\u001b]52;c;eA==\\u0007": 1', r"'\\x1b\]52;c;eA==\\x07'=1 is not supported"),
        (f'"x": "{"y" * 100_000}"', "x='yyy.*is not supported"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(folder: Path, text: str, message: str) -> None:
    file = folder / "adapter_config.json"
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    kept = json.dumps({field: value for field, value in plain.items() if f'"{field}"' not in text})
    file.write_text(f"{kept[:-1]}, {text}}}")
    refused(folder, message)


def test_a_configuration_that_is_no_text_or_far_too_long_is_refused(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_bytes(b'{"peft_type": "\xff"}')
    refused(folder, "is not valid JSON")
    with file.open("w") as opened:
        opened.truncate(1 << 40)  # a sparse file: a terabyte that takes no room
    refused(folder, "has 1,099,511,627,776 bytes")


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e8m0fnu]
)
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, {A: torch.ones(2, 48).to(dtype)})
    refused(folder, "adapter_model.safetensors: base_model.*lora_A.weight is of type")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_float8_are_read_as_the_numbers_they_are(folder: Path, dtype: torch.dtype) -> None:
    changed = {A: (torch.arange(96.0).reshape(2, 48) / 16).to(dtype)}
    rewrite(folder, changed)
    adapter = load_adapter(folder, AdapterBank(tiny_model("llama")))
    assert torch.equal(adapter.factors[Q].A, changed[A].float())


@pytest.mark.parametrize(
    "value", [torch.tensor(float("nan")), torch.tensor(float("-inf")), torch.tensor(1e300, dtype=torch.float64)]
)
@pytest.mark.parametrize("key", [A, B])
def test_weights_that_are_not_finite_are_refused(folder: Path, key: str, value: Tensor) -> None:
    weight = load_file(folder / "adapter_model.safetensors")[key].to(value.dtype)
    weight[1, 1] = value
    rewrite(folder, {key: weight})
    refused(folder, f"adapter_model.safetensors: {key} holds values that are not finite")


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "x" * 100_000, ".base_layer" * 50_000 + ".lora_A.weight", "é\n.lora_A.weight"]
)
def test_a_strange_name_of_a_tensor_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, {f"base_model.model.{name}": torch.ones(2, 2)})
    refused(folder, "is unknown")


@pytest.mark.parametrize(
    "shape", [[2, 1 << 40], [1 << 62, 4], [1 << 63, 1 << 63], [-1, 48], [0, 48], [2, 47], [], [2.5, 48]]
)
def test_a_header_that_promises_another_size_is_refused(folder: Path, shape: list[Any]) -> None:
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        size = opened.get_tensor(A).numel() * 4
    header = {
        A: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
        B: {"dtype": "F32", "shape": [64, 2], "data_offsets": [size, size + 512]},
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size + 512))
    refused(folder, "adapter_model.safetensors")


def test_an_adapter_of_infinite_scale_cannot_be_made() -> None:
    for alpha in (float("inf"), float("nan"), 0.0, -1.0):
        with pytest.raises(ValueError, match="must be > 0"):
            Adapter("a", [Site(Q, 48, 64)], rank=2, alpha=alpha)
        with pytest.raises(ValueError, match=f"alpha of {Q} must be > 0 and finite"):
            Adapter("a", [Site(Q, 48, 64)], rank=2, alphas={Q: alpha})
