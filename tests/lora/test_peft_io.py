"""Adapter folders mean the same here and in `peft`, both ways; what is not understood is refused, and says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lora.lora import peft_io
from rl_lora.lora.adapter import Adapter, Site
from rl_lora.lora.bank import AdapterBank
from rl_lora.lora.peft_io import check_adapter, load_adapter, save_adapter
from tests.tiny import ARCHITECTURES, MOE, randomize, tiny_model, token_ids

pytestmark = [
    # PEFT compares rank_pattern with modules only when it warns; on parameters it does resolve it, as the logits show.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.*(config file in|fetch remote file|is_gradient_checkpointing|fan_in_fan_out)"),
]
IDS = token_ids(3, 13)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def our_logits(bank: AdapterBank, name: str | None) -> Tensor:
    with torch.no_grad(), bank.route([name] * len(IDS)):
        out: Tensor = bank.model(input_ids=IDS, use_cache=False).logits
    return out


def peft_logits(model: peft.PeftModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return out


def new_bank(arch: str) -> AdapterBank:
    return AdapterBank(tiny_model(arch))


def adapted_by_peft(model: peft.PeftModel) -> set[str]:
    """Paths of what PEFT put a LoRA on, parameters included."""
    found = set()
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            path = path.replace(".base_layer", "")
            found.add(f"{path}.{module.parameter_name}" if hasattr(module, "parameter_name") else path)
    return found


def peft_model(arch: str, **fields: Any) -> peft.PeftModel:
    """A PEFT adapter with noise in A and B."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 12, **fields})
    model = peft.get_peft_model(tiny_model(arch), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def saved(tmp_path: Path, arch: str, rank: int = 2) -> Path:
    return save_adapter(randomize(new_bank(arch).add("a", rank=rank), 1), tmp_path / "a", "org/tiny")


def rewrite(folder: Path, change: Change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def cut(part: str, dim: int) -> Change:
    """The last entry along `dim` is missing from tensors whose key holds `part`."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        short = {key: t.narrow(dim, 0, t.shape[dim] - 1).contiguous() for key, t in tensors.items() if part in key}
        return tensors | short

    return change


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_peft_gives_our_logits_from_our_folder(tmp_path: Path, arch: str, rank: int) -> None:
    bank = new_bank(arch)
    adapter = randomize(bank.add("a", rank=rank, alpha=12), 1)
    model = peft.PeftModel.from_pretrained(tiny_model(arch), save_adapter(adapter, tmp_path / "a", "tiny"))
    assert adapted_by_peft(model) == {site.name for site in adapter.sites}
    torch.testing.assert_close(peft_logits(model), our_logits(bank, "a"), rtol=1e-5, atol=1e-5)
    assert (our_logits(bank, "a") - our_logits(bank, None)).abs().max() > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_we_give_peft_logits_from_its_folder(tmp_path: Path, arch: str) -> None:
    if arch in MOE:
        model = peft_model(arch, r=3, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS)
    else:
        model = peft_model(arch, r=3, target_modules="all-linear")
    model.save_pretrained(str(tmp_path / "theirs"))
    bank = new_bank(arch)
    adapter = load_adapter(tmp_path / "theirs", bank)
    assert adapter.name == "theirs"
    assert {site.name for site in adapter.sites} == adapted_by_peft(model)
    torch.testing.assert_close(our_logits(bank, "theirs"), peft_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True])
def test_our_own_round_trip_is_exact(tmp_path: Path, arch: str, rslora: bool) -> None:
    bank = new_bank(arch)
    sites = list(bank.sites.values())
    first, last = sites[0].name, sites[-1].name
    options: dict[str, Any] = {"rank": 4, "alpha": 7.5, "ranks": {first: 2, last: 3}, "alphas": {last: 1.25}}
    adapter = randomize(bank.put(Adapter("a", sites, rslora=rslora, active_experts=2, **options)), 1)
    other = new_bank(arch)
    twin = load_adapter(save_adapter(adapter, tmp_path / "a", "tiny"), other, name="twin")
    assert twin.name == "twin"
    for field in ("sites", "rank", "alpha", "ranks", "alphas", "rslora"):
        assert getattr(twin, field) == getattr(adapter, field)
    assert twin.hash() == adapter.hash()
    assert torch.equal(our_logits(other, "twin"), our_logits(bank, "a"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), tmp_path / "a")
    torch.testing.assert_close(peft_logits(theirs), our_logits(bank, "a"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]),
        ("mixtral", ["layers.1.mlp.experts"]),
        ("mixtral", ["experts.down_proj"]),
        ("gpt_oss", ["experts"]),
        ("mixtral", ["layers.0.mlp.experts.gate_up_proj", "k_proj"]),
        ("gpt2", ["h.1.mlp.c_proj"]),  # `attn.c_proj` ends alike
    ],
)
def test_peft_adapts_exactly_the_layers_of_a_partial_adapter(tmp_path: Path, arch: str, targets: list[str]) -> None:
    bank = new_bank(arch)
    adapter = randomize(bank.add("a", rank=4, targets=targets), 1)
    folder = save_adapter(adapter, tmp_path / "a", "tiny")
    model = peft.PeftModel.from_pretrained(tiny_model(arch), folder)
    assert adapted_by_peft(model) == {site.name for site in adapter.sites}
    torch.testing.assert_close(peft_logits(model), our_logits(bank, "a"), rtol=1e-5, atol=1e-5)
    assert load_adapter(folder, new_bank(arch)).sites == adapter.sites


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("llama", {"r": 2, "target_modules": r".*layers\.1\.self_attn\.[qv]_proj"}),
        ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True, "lora_dropout": 0.1}),
        (
            "qwen2",
            {
                "r": 2,
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(up|down)_proj": 5, "proj": 1},
                "alpha_pattern": {"layers.0.self_attn.k_proj": 20, "up_proj": 3},
            },
        ),
        ("mixtral", {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}),
        ("mixtral", {"r": 3, "target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        (
            "gpt_oss",
            {"r": 2, "target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 3}},
        ),
        ("gpt2", {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": "gaussian"}),
    ],
)
def test_what_peft_can_target_we_can_read(tmp_path: Path, arch: str, fields: dict[str, Any]) -> None:
    model = peft_model(arch, **fields)
    model.save_pretrained(str(tmp_path / "theirs"))
    bank = new_bank(arch)
    adapter = load_adapter(tmp_path / "theirs", bank)
    assert {site.name for site in adapter.sites} == adapted_by_peft(model)
    torch.testing.assert_close(our_logits(bank, "theirs"), peft_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(tmp_path, "llama")
    rewrite(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    adapter = load_adapter(folder, new_bank("llama"))
    assert adapter.flat.dtype == torch.float32
    key = "model.layers.0.self_attn.q_proj"
    stored = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{key}.lora_A.weight"]
    assert torch.equal(adapter.factors[key].A, stored.float())


def test_the_files_are_what_other_readers_expect(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mixtral", rank=4)
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert all(tensor.dtype == torch.float32 and tensor.dim() == 2 for tensor in tensors.values())
    experts = "base_model.model.model.layers.0.mlp.experts"  # 4 experts of rank 4 / 2 active; 48 and 64 features
    assert tensors[f"{experts}.base_layer.lora_A.weight"].shape == (8, 48)
    assert tensors[f"{experts}.base_layer.lora_B.weight"].shape == (128, 8)
    assert tensors[f"{experts}.lora_A.weight"].shape == (8, 64)
    assert tensors[f"{experts}.lora_B.weight"].shape == (48, 8)
    config = check_adapter(folder)
    assert config["base_model_name_or_path"] == "org/tiny"
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 32, False)
    assert config["rank_pattern"]["model.layers.0.mlp.experts.down_proj"] == 2
    assert check_adapter(save_adapter(new_bank("gpt2").add("a"), tmp_path / "gpt2", "gpt2"))["fan_in_fan_out"] is True


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    folder, bank = saved(tmp_path, "llama"), new_bank("llama")
    other = randomize(bank.add("other", rank=1), 7)
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already exists; choose another"):
        save_adapter(other, folder, "tiny")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    save_adapter(other, folder, "tiny", overwrite=True)
    assert load_adapter(folder, bank).hash() == other.hash()
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(ValueError, match="replace an adapter folder with overwrite=True"):
        save_adapter(other, precious, "tiny", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "precious"]


def test_an_interrupted_write_leaves_nothing_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    before = load_file(folder / "adapter_model.safetensors")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_io, "_config", full_disk)
    adapter = new_bank("llama").add("b")
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            save_adapter(adapter, target, "tiny", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_peft_is_not_imported() -> None:
    code = "import sys, rl_lora.lora.peft_io; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOKR"}, "peft_type is 'LOKR'; only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"a_field_of_tomorrow": {"x": 1}}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"r": 0}, "r must be a number > 0, got 0"),
        ({"lora_alpha": None}, "lora_alpha must be a number > 0, got None"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj must be a number > 0, got -1"),
    ],
)
def test_another_kind_of_adapter_is_refused_before_a_model_is_loaded(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path, "llama")
    configure(folder, **fields)
    with pytest.raises(ValueError, match=message):
        check_adapter(folder)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": (48,)}, "is DoRA"),
        ({f"{Q}.lora_B.bias": (48,)}, "is a trained bias"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 258)}, "is an adapter on embeddings"),
        ({f"{Q}.lora_A.default.weight": (2, 48)}, "is unknown"),
        ({"base_model.model.lm_head.weight": (258, 48)}, "is unknown"),
        ({f"{Q}.base_layer.lora_A.weight": (2, 48)}, "not .*base_layer.lora_B.weight; the file is incomplete"),
        ({f"{Q}.lora_A.weight": (0,)}, r"has shape \(0,\), expected two dimensions"),
    ],
)
def test_a_tensor_without_a_place_is_refused_before_a_model_is_loaded(
    tmp_path: Path, added: dict[str, tuple[int, ...]], message: str
) -> None:
    folder = saved(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors | {key: torch.ones(shape) for key, shape in added.items()})
    with pytest.raises(ValueError, match=message):
        check_adapter(folder)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter folder at"):
        check_adapter(tmp_path / "nowhere")
    folder = saved(tmp_path, "llama")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    rewrite(folder, lambda tensors: {})
    with pytest.raises(ValueError, match="holds no tensor"):
        check_adapter(folder)
    weights.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        check_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors is missing; save it again .* pickles are not read"
    ):
        check_adapter(folder)
    config.write_text("{")
    weights.touch()
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        check_adapter(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match="only LORA adapters"):
        check_adapter(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        check_adapter(folder)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("llama", renamed("layers.1.", "layers.7."), r"layers.7.* no such module .*another model"),
        ("llama", renamed("model.model.", "model."), r"'layers.0.* no such module \(it has model.layers.0"),
        (
            "llama",
            renamed("model.layers.0.self_attn.q_proj", "lm_head"),
            "'lm_head', but that is a Linear which carries",
        ),
        ("llama", renamed("layers.0.self_attn.q_proj", "embed_tokens"), "that is a Embedding which carries none"),
        ("mixtral", renamed("self_attn.q_proj", "mlp.gate"), "that is a MixtralTopKRouter which carries none"),
        ("mixtral", renamed(".base_layer", ".base_layer.base_layer"), "weights for 'model.layers.0.mlp.experts', but"),
        ("llama", renamed("q_proj.lora", "q_proj.base_layer.lora"), "weights for .*q_proj', but"),
        ("llama", cut("k_proj.lora_A", 1), r"k_proj.lora_A.weight has shape \(2, 47\), the model needs \(rank, 48\)"),
        ("llama", cut("k_proj.lora_B", 0), r"k_proj.lora_B.weight has shape \(31, 2\), the model needs \(32, rank\)"),
        ("mixtral", cut("base_layer.lora_A", 0), r"has shape \(3, 48\), the model needs \(rank \* 4, 48\)"),
        ("llama", cut("q_proj.lora_A", 0), "q_proj: A has rank 1 and B rank 2, but adapter_config.json says 2"),
        ("llama", cut("q_proj.lora_B", 1), "q_proj: A has rank 2 and B rank 1, but adapter_config.json says 2"),
    ],
)
def test_an_adapter_for_another_model_is_refused(tmp_path: Path, arch: str, change: Change, message: str) -> None:
    folder, bank = saved(tmp_path, arch), new_bank(arch)
    rewrite(folder, change)
    check_adapter(folder)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, bank)
    assert not bank.adapters


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", rank=2)
    configure(folder, r=4)
    with pytest.raises(ValueError, match="A has rank 2 and B rank 2, but adapter_config"):
        load_adapter(folder, new_bank("llama"))


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path, arch: str) -> None:
    with pytest.raises(ValueError, match="the model has no such module"):
        load_adapter(saved(tmp_path, "llama"), new_bank(arch))


def test_sites_of_one_path_but_another_width_are_refused(tmp_path: Path) -> None:
    wide = Adapter("a", [Site("model.layers.0.self_attn.q_proj", 32, 64)], rank=2)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight has shape \(2, 32\), the model needs \(rank, 48\)"):
        load_adapter(save_adapter(wide, tmp_path / "wide", "wide"), new_bank("llama"))
