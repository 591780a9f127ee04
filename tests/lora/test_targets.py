"""Which places of a model a name means, and on which of them an adapter stands by default."""

from __future__ import annotations

import pytest

from rl_lora.lora.bank import AdapterBank
from tests.tiny import ARCHITECTURES, MOE, tiny_model, tiny_multimodal


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adapters_stand_on_every_linear_layer_and_expert_but_not_on_head_or_router(arch: str) -> None:
    names = {site.rpartition(".")[2] for site in AdapterBank(tiny_model(arch)).sites}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if arch == "gpt2":
        assert names == {"c_attn", "c_proj", "c_fc"}
    elif arch in MOE:
        assert names == attention | {"gate_up_proj", "down_proj"}
    else:
        assert names == attention | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", ["q_proj", ["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]])
def test_targets_are_names_or_the_ends_of_paths(targets: str | list[str]) -> None:
    sites = [site.name for site in AdapterBank(tiny_model("llama")).match(targets)]
    assert sites[0] == "model.layers.0.self_attn.q_proj"
    assert len(sites) == (1 if "layers" in str(targets) else 2)


def test_experts_are_targeted_as_a_whole_or_by_parameter() -> None:
    bank = AdapterBank(tiny_model("mixtral"))
    assert len(bank.match("experts")) == 4
    assert [site.name for site in bank.match("experts.down_proj")] == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]


@pytest.mark.parametrize("name", ["q_prog", "proj", "lm_head", "gate", "embed_tokens", ""])
def test_a_target_that_matches_nothing_lists_what_is_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"no module matches '{name}'; .* down_proj, gate_up_proj, k_proj, o_proj, q_"):
        AdapterBank(tiny_model("mixtral")).add("a", targets=["q_proj", name])


@pytest.mark.parametrize(
    "pattern", [".*q_proj", "q_proj|k_proj", r"layers\.0\..*", "q_proj$", "[qk]_proj", "q_proj, k_proj"]
)
def test_a_pattern_as_a_target_is_told_that_names_are_meant(pattern: str) -> None:
    with pytest.raises(ValueError, match="; names, not patterns, are meant; linear layers here are down_proj"):
        AdapterBank(tiny_model("llama")).match(pattern)


def test_of_a_multimodal_model_only_the_language_model_is_adapted_unless_others_are_named() -> None:
    bank = AdapterBank(tiny_multimodal())
    language = {name for name in bank.sites if name.startswith("model.language_model.")}
    assert {site.name for site in bank.match("all-linear")} == language
    assert {site.name for site in bank.match(["q_proj", "down_proj"])} < language
    assert [site.name for site in bank.match("encoder.layers.0.mlp.fc1")] == [
        "model.vision_tower.encoder.layers.0.mlp.fc1"
    ]
    query = "vision_tower.encoder.layers.1.self_attn.q_proj"
    assert next(site.name for site in bank.match(["v_proj", query])) == f"model.{query}"
    assert bank.left_alone(bank.add("all")) == {"vision_tower": 15}
    assert bank.left_alone(bank.add("some", targets=["q_proj", query])) == {"vision_tower": 14}


def test_a_model_of_text_alone_has_nothing_that_is_left_alone_unsaid() -> None:
    for arch in ARCHITECTURES:
        bank = AdapterBank(tiny_model(arch))
        assert [site.name for site in bank.match("all-linear")] == list(bank.sites)
        assert bank.left_alone(bank.add("few", targets=next(iter(bank.sites)))) == {}


def test_a_pattern_as_a_target_is_told_from_a_name() -> None:
    with pytest.raises(ValueError, match=r"no module matches '\.\*q_proj'; names, not patterns, are meant"):
        AdapterBank(tiny_model("llama")).match(".*q_proj")
