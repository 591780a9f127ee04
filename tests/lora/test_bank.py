"""What adapters promise: the base stays as it is, rows do not touch each other, and the deltas are scale * B A.

The oracle is the model itself in float64 with W + scale * B A written into its weights.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora.lora.adapter import Adapter, Site
from rl_lora.lora.bank import AdapterBank
from rl_lora.lora.layers import LoRAExperts, LoRALinear
from rl_lora.lora.targets import find_sites
from tests.tiny import ARCHITECTURES, DENSE, MOE, randomize, tiny_model, token_ids

LENGTH = 13


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def routed(bank: AdapterBank, ids: Tensor, adapters: list[str | None]) -> Tensor:
    with torch.no_grad(), bank.route(adapters):
        return logits(bank.model, ids)


def bank_of_three(arch: str) -> AdapterBank:
    """Adapters of different rank, alpha and targets."""
    bank = AdapterBank(tiny_model(arch))
    attention = "c_attn" if arch == "gpt2" else ["q_proj", "v_proj"]
    randomize(bank.add("a", rank=1), 1)
    randomize(bank.add("b", rank=5, alpha=8), 2)
    randomize(bank.add("c", rank=2, alpha=16, targets=attention), 3)
    return bank


def dense(arch: str, adapter: Adapter) -> tuple[PreTrainedModel, dict[str, tuple[Tensor, Tensor]]]:
    """A float64 model with the deltas in its weights, and the float64 leaves (A, B) that they come from."""
    model = tiny_model(arch, dtype=torch.float64).requires_grad_(False)
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    for site in adapter.sites:
        A, B = (getattr(adapter.factors[site.name], x).detach().double().requires_grad_() for x in "AB")
        delta = adapter.alphas[site.name] / adapter.ranks[site.name] * B @ A
        module = model.get_submodule(site.module)
        leaf = site.name.rpartition(".")[2] if site.experts else "weight"
        weight = getattr(module, leaf) + (delta.transpose(-1, -2) if site.transposed else delta)
        delattr(module, leaf)
        setattr(module, leaf, weight)
        leaves[site.name] = (A, B)
    return model, leaves


def some_loss(out: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of the next token, a sum over rows: rows contribute on their own."""
    picked = out.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return -picked.sum()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fresh_adapter_changes_no_logit_to_the_bit(arch: str) -> None:
    ids = token_ids(4, LENGTH)
    with torch.no_grad():
        pristine = logits(tiny_model(arch), ids)
    bank = AdapterBank(tiny_model(arch))
    bank.add("a", rank=3)
    bank.add("b", rank=1)
    with torch.no_grad():
        assert torch.equal(logits(bank.model, ids), pristine)
    assert torch.equal(routed(bank, ids, [None] * 4), pristine)
    assert torch.equal(routed(bank, ids, ["a"] * 4), pristine)
    assert torch.equal(routed(bank, ids, ["a", "b", "a", "b"]), pristine)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_without_adapter_give_the_base_whatever_their_neighbours(arch: str) -> None:
    ids, bank = token_ids(5, LENGTH), bank_of_three(arch)
    with torch.no_grad():
        bank["a"].flat.fill_(torch.nan)
        pristine = logits(tiny_model(arch), ids)
    neighbours: list[list[str | None]] = [
        ["b", None, "b", None, None],
        ["c", None, "b", None, None],
        ["a", None, "c", None, None],
    ]
    out, *others = [routed(bank, ids, tags)[[1, 3, 4]] for tags in neighbours]
    assert all(torch.equal(out, other) for other in others)
    if arch in DENSE:
        assert torch.equal(out, pristine[[1, 3, 4]])
    else:  # the last bit of an expert's product depends on how many tokens it gets: here, from three rows, not five
        close(out, pristine[[1, 3, 4]])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_row_does_not_depend_on_which_adapters_share_its_batch(arch: str) -> None:
    ids, bank = token_ids(6, LENGTH), bank_of_three(arch)
    tags: list[str | None] = ["a", "b", None, "a", "c", "b"]  # interleaved: no adapter's rows are neighbours
    mixed = routed(bank, ids, tags)
    for name in ("a", "b", "c", None):
        rows = [i for i, tag in enumerate(tags) if tag == name]
        alone = routed(bank, ids, [name] * 6)
        close(mixed[rows], alone[rows])
        close(mixed[rows], routed(bank, ids[rows], [name] * len(rows)))
        assert all((mixed[i] - alone[i]).abs().max() > 1e-2 for i in range(6) if i not in rows), "no effect"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_several_adapters_in_one_forward_and_backward_equal_dense_deltas(arch: str) -> None:
    ids, bank = token_ids(6, LENGTH), bank_of_three(arch)
    tags: list[str | None] = ["a", "b", "a", "c", None, "b"]
    for adapter in bank.adapters.values():
        adapter.zero_grad()
    with bank.route(tags):
        out = logits(bank.model, ids)
        some_loss(out, ids).backward()
    for name, adapter in bank.adapters.items():
        rows = [i for i, tag in enumerate(tags) if tag == name]
        model, leaves = dense(arch, adapter)
        expected = logits(model, ids[rows])
        close(out[rows], expected)
        some_loss(expected, ids[rows]).backward()
        for site, (A, B) in leaves.items():
            assert A.grad is not None
            assert B.grad is not None
            assert B.grad.abs().max() > 0, f"{site} had no effect"
            scale = torch.maximum(A.grad.abs().max(), B.grad.abs().max())
            ours = adapter.factors[site]
            assert ours.A.grad is not None
            assert ours.B.grad is not None
            close(ours.A.grad / scale, A.grad / scale, 2e-5)
            close(ours.B.grad / scale, B.grad / scale, 2e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_gradients_of_one_batch_are_the_sum_of_those_computed_one_by_one(arch: str) -> None:
    ids, bank = token_ids(4, LENGTH), bank_of_three(arch)
    tags: list[str | None] = ["b", "a", "b", "c"]

    def gradients(batches: list[list[int]]) -> dict[str, Tensor]:
        for adapter in bank.adapters.values():
            adapter.zero_grad()
        for rows in batches:
            with bank.route([tags[i] for i in rows]):
                some_loss(logits(bank.model, ids[rows]), ids[rows]).backward()
        return {name: adapter.flat.grad.clone() for name, adapter in bank.adapters.items()}  # type: ignore[union-attr]

    together, one_by_one = gradients([[0, 1, 2, 3]]), gradients([[0], [1], [2], [3]])
    for name, grad in together.items():
        close(grad / grad.abs().max(), one_by_one[name] / grad.abs().max(), 2e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_nan_in_one_adapter_reaches_no_other_row_and_no_other_gradient(arch: str) -> None:
    ids, bank = token_ids(4, LENGTH), bank_of_three(arch)
    clean = routed(bank, ids, ["b", "a", "b", None])
    with torch.no_grad():
        bank["a"].flat.fill_(torch.nan)
    bank["b"].zero_grad()
    with bank.route(["b", "a", "b", None]):
        out = logits(bank.model, ids)
        some_loss(out[[0, 2]], ids[[0, 2]]).backward()
    assert out[1].isnan().all()
    close(out[[0, 2, 3]], clean[[0, 2, 3]])
    assert bank["b"].flat.grad is not None
    assert bank["b"].flat.grad.isfinite().all()


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_tokens_of_one_row_can_carry_different_adapters(arch: str) -> None:
    """One entry a token, as in a packed row. In the first layer's MLP input nothing has mixed yet."""
    bank = bank_of_three(arch)
    name = "model.layers.0.self_attn.q_proj"
    layer, x = bank.model.get_submodule(name), torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    with bank.route(["a", None, "b", "a"]):
        mixed = layer(x)
    for i, tag in enumerate(["a", None, "b", "a"]):
        with bank.route([tag]):
            close(mixed[:, i], layer(x[:, i : i + 1])[:, 0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_fills_the_flat_gradient_and_leaves_base_and_other_adapters_alone(arch: str) -> None:
    ids, bank = token_ids(3, LENGTH), AdapterBank(tiny_model(arch))
    pristine = AdapterBank(tiny_model(arch)).base_hash()
    trained, other = bank.add("trained", rank=2), randomize(bank.add("other", rank=2), 1)
    before, other_before = trained.hash(), other.hash()
    optimizer = torch.optim.AdamW([trained.flat], lr=1e-2)
    losses = []
    for _ in range(3):
        trained.zero_grad()
        with bank.route(["trained"] * 3):
            loss = some_loss(logits(bank.model, ids), ids)
        loss.backward()
        assert trained.flat.grad is not None
        grads = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
        assert torch.equal(grads, trained.flat.grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert trained.hash() != before
    assert other.hash() == other_before
    assert bank.base_hash() == pristine
    assert all(p.grad is None and not p.requires_grad for p in bank.model.parameters())


@pytest.mark.parametrize("optimizer", ["single", "foreach", "fused"])
def test_inference_in_bfloat16_sees_every_update(optimizer: str) -> None:
    ids, bank = token_ids(2, LENGTH), AdapterBank(tiny_model("llama", dtype=torch.bfloat16))
    adapter = randomize(bank.add("a", rank=2), 1)
    adapter.zero_grad()
    assert adapter.flat.grad is not None
    adapter.flat.grad.normal_(generator=torch.Generator().manual_seed(0))
    adamw = torch.optim.AdamW([adapter.flat], lr=0.1, foreach=optimizer == "foreach", fused=optimizer == "fused")

    def step() -> None:
        adamw.step()
        adapter.version += optimizer == "fused"  # the others need no help

    seen = [routed(bank, ids, ["a", "a"])]
    for update in (step, lambda: adapter.factors["model.layers.0.mlp.up_proj"].B.add_(1), adapter.flat.zero_):
        with torch.no_grad():
            update()
        seen.append(routed(bank, ids, ["a", "a"]))
        assert not torch.equal(seen[-1], seen[-2])
    with torch.no_grad():
        assert torch.equal(seen[-1], logits(bank.model, ids))
    with torch.inference_mode(), bank.route(["a", "a"]):
        assert torch.equal(logits(bank.model, ids), seen[-1])


def test_experts_share_the_rank_that_one_token_gets() -> None:
    adapter = AdapterBank(tiny_model("mixtral")).add("a", rank=8)  # two of four experts are active
    assert {site: rank for site, rank in adapter.ranks.items() if "experts" in site}.popitem()[1] == 4
    assert adapter.ranks["model.layers.0.self_attn.q_proj"] == 8
    assert AdapterBank(tiny_model("mixtral")).add("a", rank=1).ranks["model.layers.0.mlp.experts.down_proj"] == 1


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("arch", MOE)
def test_other_experts_implementations_serve_the_base_and_agree(arch: str, implementation: str) -> None:
    ids, eager, bank = token_ids(4, LENGTH), bank_of_three(arch), bank_of_three(arch)
    bank.model.set_experts_implementation(implementation)
    pristine = tiny_model(arch)
    pristine.set_experts_implementation(implementation)
    with torch.no_grad():
        assert torch.equal(routed(bank, ids, [None] * 4), logits(pristine, ids))
    tags: list[str | None] = ["a", None, "b", "c"]
    close(routed(bank, ids, tags), routed(eager, ids, tags), 2e-5)


def test_rows_of_an_adapter_without_experts_run_the_base_experts() -> None:
    ids, bank = token_ids(2, LENGTH), bank_of_three("mixtral")
    alone = AdapterBank(tiny_model("mixtral"))
    randomize(alone.add("c", rank=2, alpha=16, targets=["q_proj", "v_proj"]), 3)
    assert not any(isinstance(module, LoRAExperts) for module in alone.model.modules())
    assert torch.equal(routed(bank, ids, ["c", "c"]), routed(alone, ids, ["c", "c"]))


def test_bad_adapters_are_refused() -> None:
    bank = AdapterBank(tiny_model("llama"))
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        bank.add("a", rank=0)
    with pytest.raises(ValueError, match="alpha must be > 0, got -1"):
        bank.add("a", alpha=-1)
    with pytest.raises(ValueError, match="stands on no layer"):
        bank.add("a", targets=[])
    sites = list(bank.sites.values())
    with pytest.raises(ValueError, match="every rank must be >= 1"):
        Adapter("a", sites, rank=1, ranks={sites[0].name: 0})
    with pytest.raises(ValueError, match="but the model has None"):
        bank.put(Adapter("a", [Site("elsewhere", 4, 4)], rank=1))
    with pytest.raises(ValueError, match="in the model's order"):
        bank.put(Adapter("a", sites[::-1], rank=1))
    assert not bank.adapters
    assert not any(isinstance(module, LoRALinear) for module in bank.model.modules()), "a refused adapter left its mark"


def test_names_are_unique_and_known() -> None:
    bank = AdapterBank(tiny_model("llama"))
    bank.add("a")
    with pytest.raises(ValueError, match="already holds an adapter named 'a'"):
        bank.add("a")
    with pytest.raises(ValueError, match="no adapter is named 'b'; the bank holds \\['a'\\]"), bank.route(["a", "b"]):
        pass
    with pytest.raises(ValueError, match="no adapter is named 'b'"):
        bank.remove("b")
    bank.remove("a")
    bank.add("a")


def test_a_model_has_one_bank() -> None:
    model = tiny_model("llama")
    AdapterBank(model).add("a", targets="q_proj")
    with pytest.raises(ValueError, match="already has an adapter bank"):
        AdapterBank(model)


def test_routes_nest_and_end_even_after_an_error() -> None:
    ids, bank = token_ids(2, LENGTH), bank_of_three("llama")
    expected = routed(bank, ids, ["a", "b"])
    with torch.no_grad(), bank.route(["a", "b"]):
        with pytest.raises(RuntimeError), bank.route([None, None]):
            raise RuntimeError
        assert torch.equal(logits(bank.model, ids), expected)
    assert bank.routing is None


def test_the_seed_decides_A() -> None:
    sites = list(find_sites(tiny_model("mixtral")))
    one, same, another = (Adapter("a", sites, rank=2, seed=seed) for seed in (0, 0, 1))
    assert one.hash() == same.hash()
    assert one.hash() != another.hash()
    for site in sites:
        bound = site.in_features**-0.5
        assert 0.9 * bound < one.factors[site.name].A.abs().max() <= bound
        assert not one.factors[site.name].B.any()


def test_models_can_read_what_a_wrapped_layer_is() -> None:
    pristine, bank = tiny_model("qwen2"), AdapterBank(tiny_model("qwen2"))
    bank.add("a")
    path = "model.layers.0.self_attn.q_proj"
    layer, base = bank.model.get_submodule(path), pristine.get_submodule(path)
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer.weight, base.weight)  # type: ignore[arg-type]
    assert torch.equal(layer.bias, base.bias)  # type: ignore[arg-type]
    assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    experts = AdapterBank(tiny_model("mixtral"))
    experts.add("a")
    assert experts.model.get_submodule("model.layers.0.mlp.experts").num_experts == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copied_bank_is_whole_and_independent(duplicate: Callable[[AdapterBank], AdapterBank]) -> None:
    ids, bank = token_ids(2, LENGTH), bank_of_three("llama")
    twin = duplicate(bank)
    assert torch.equal(routed(twin, ids, ["a", "b"]), routed(bank, ids, ["a", "b"]))
    with torch.no_grad():
        twin["a"].flat.zero_()
    assert torch.equal(routed(twin, ids, ["a", "a"]), routed(bank, ids, [None, None]))
    assert not torch.equal(routed(bank, ids, ["a", "a"]), routed(bank, ids, [None, None]))
