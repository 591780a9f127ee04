"""What a batch's layers add, row by row: kept until the adapters change; and mixed batches of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rl_lora.config import LearnerConfig
from rl_lora.kernels import packed_gemm
from rl_lora.kernels.row_deltas import RowDeltas
from rl_lora.learner.learner import Learner
from rl_lora.lora.bank import AdapterBank
from tests.oracles import Oracle, episode, gradient, group, relative_error, tiny_policy, turn
from tests.tiny import randomize, tiny_model, token_ids

DTYPES = [torch.float32, torch.bfloat16]
SITE = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
TAGS: list[str | None] = ["b", None, "a", "c", "b", "a"]

needs_ours = pytest.mark.skipif(packed_gemm.library() is None, reason="GCC, and AVX2 or AVX-512 are not here")


def bank_of_three() -> AdapterBank:
    bank = AdapterBank(tiny_model("llama"))
    randomize(bank.add("a", rank=2, alpha=3), 1)
    randomize(bank.add("b", rank=5, alpha=8), 2)
    randomize(bank.add("c", rank=1, alpha=16, targets=["q_proj"]), 3)
    return bank


def delta(deltas: RowDeltas, row: int, n_out: int, n_in: int) -> Tensor:
    """What a row's W is changed by."""
    ranks = slice(int(deltas.first[row]), int(deltas.first[row] + deltas.count[row]))
    return deltas.B[ranks, :n_out].float().t() @ deltas.A[ranks, :n_in].float()


def check(bank: AdapterBank, found: RowDeltas, tags: Sequence[str | None], site: str) -> None:
    """Each row changes W by its own adapter's scale * B A."""
    at = bank.sites[site]
    tolerance = 0.02 if found.A.dtype == torch.bfloat16 else 1e-5
    for row, tag in enumerate(tags):
        factors = None if tag is None else bank[tag].factors.get(site)
        if factors is None:
            assert found.count[row] == 0
            continue
        expected = factors.scale * factors.B.detach() @ factors.A.detach()
        ours = delta(found, row, at.out_features, at.in_features)
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    assert found.most >= int(found.count.max())


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_adds_what_its_adapter_does(dtype: torch.dtype) -> None:
    bank = bank_of_three()
    with bank.route(TAGS):
        found = bank.deltas(dtype)
        assert found.keys() == bank.sites.keys()
        for site in (SITE, UP):
            check(bank, found[site], TAGS, site)
            of_tokens = bank._current.deltas(site, 3 * len(TAGS), dtype)
            assert of_tokens is not None
            check(bank, of_tokens[0], [tag for tag in TAGS for _ in range(3)], site)
    with bank.route([None, None]):
        assert not bank.deltas(dtype)
    with bank.route(["c"]):
        assert all(site.endswith("q_proj") for site in bank.deltas(dtype))


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_follows_the_adapters(dtype: torch.dtype) -> None:
    """In-place changes, counted steps, and adapters that are removed and added under the same name."""
    bank = bank_of_three()

    def found() -> RowDeltas:
        with bank.route(TAGS):
            deltas = bank.deltas(dtype)[SITE]
            assert bank.deltas(dtype)[SITE] is deltas, "made anew although nothing has changed"
            of_layer = bank._current.deltas(SITE, len(TAGS), dtype)
            assert of_layer is not None
            assert of_layer[0].A is deltas.A
        check(bank, deltas, TAGS, SITE)
        return deltas

    def behind_torch() -> None:  # as fused optimizers write: only `version` tells
        bank["a"].flat.data.mul_(2)
        bank["a"].version += 1

    def another() -> None:
        bank.remove("b")
        randomize(bank.add("b", rank=3, alpha=7), 9)

    changes: list[Callable[[], object]] = [
        lambda: bank["a"].flat.mul_(-1),
        lambda: bank["c"].factors[SITE].B.add_(1),
        behind_torch,
        another,
    ]
    seen = [found()]
    for change in changes:
        with torch.no_grad():
            change()
        seen.append(found())
        assert seen[-1].A.shape != seen[-2].A.shape or not torch.equal(
            torch.cat([seen[-1].A, seen[-1].B]), torch.cat([seen[-2].A, seen[-2].B])
        )
    with bank.route(["b", "a"]):
        check(bank, bank.deltas(dtype)[SITE], ["b", "a"], SITE)
    found()
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with bank.route(TAGS):
        assert bank.deltas(other)[SITE].A.dtype == other
    found()


@needs_ours
def test_what_was_kept_without_gradients_serves_learning() -> None:
    bank, x = bank_of_three(), torch.randn(len(TAGS), 48)
    layer = bank.model.get_submodule(SITE)
    with torch.inference_mode(), bank.route(TAGS):
        before = layer(x)
    bank["a"].zero_grad()
    with bank.route(TAGS):
        after = layer(x)
    after.sum().backward()
    assert torch.equal(after.detach(), before)
    assert gradient(bank["a"].factors[SITE].B).any()


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_in_panels_is_another_than_a_plain_one(dtype: torch.dtype) -> None:
    bank = bank_of_three()
    with bank.route(["a", "c"]):
        for _ in range(2):
            whole, plain = bank._current.stack(UP, dtype, panels=True), bank._current.stack(UP, dtype)
            assert whole is not None
            assert plain is not None
            assert plain.ranks == whole.ranks == (2, 0)
            assert (plain.A.shape, plain.B.shape) == ((2, 48), (2, 64))
            for ours, packed in ((plain.A, whole.A), (plain.B, whole.B)):
                assert packed.shape[1] == packed_gemm.padded(ours.shape[1])
                assert torch.equal(packed[:2, : ours.shape[1]], ours)
                assert not packed[:, ours.shape[1] :].any()


@needs_ours
def test_fixed_deltas_stand_in_place_of_the_batchs() -> None:
    bank, x = bank_of_three(), torch.randn(2, 48)
    layer, other = bank.model.get_submodule(SITE), bank.model.get_submodule(UP)
    with torch.no_grad(), bank.route(["a", "b"]):
        deltas = bank.deltas(torch.float32)
        expected, bare = layer(x), other(x)
    with torch.no_grad(), bank.route(["b", "c"]):
        assert not torch.equal(layer(x), expected)
        with bank.fixed({SITE: deltas[SITE]}):
            assert torch.equal(layer(x), expected)
            without = other(x)
        assert not torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(other(x), without)
    assert not torch.equal(bare, without)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(arch: str, dtype: torch.dtype) -> None:
    policy, ids = tiny_policy(arch, ["a", "b", "c"], dtype=dtype), token_ids(len(TAGS), 11)

    def logits(rows: Sequence[int], tags: Sequence[str | None]) -> Tensor:
        with torch.no_grad(), policy.bank.route(tags):
            found: Tensor = policy.model(input_ids=ids[list(rows)], use_cache=False).logits.double()
        return found

    oracle = Oracle(policy, tiny_model(arch, dtype=dtype))
    mixed, limit = logits(range(len(TAGS)), TAGS), {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    for i, tag in enumerate(TAGS):
        exact = oracle.logits(ids[i].tolist(), tag).detach()
        alone = logits([i], [tag])[0]
        assert relative_error(mixed[i], exact) < limit
        assert relative_error(mixed[i], alone) < limit
        wrong = oracle.logits(ids[i].tolist(), "a" if tag != "a" else "b").detach()
        assert relative_error(mixed[i], wrong) > 2 * limit, "no effect"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_mixed_packed_batch_are_those_of_each_adapter_alone(dtype: torch.dtype) -> None:
    """Prompts of several adapters share micro-batches, and rows of them."""
    names = ["a", "b", "c"]
    policy = tiny_policy("llama", names, dtype=dtype)
    groups = [
        group(
            *(
                episode(turn(token_ids(1, 4 + i, i)[0].tolist(), n, seed=10 * i + n), reward=float(n % 2), adapter=name)
                for n in (3, 4, 6)
            ),
            adapter=name,
        )
        for i, name in enumerate([*names, "a", "c"])
    ]
    config = LearnerConfig(max_sampler_learner_kl=1e9, max_grad_norm=0.0, tokens_per_microbatch=200)
    seen: list[set[str | None]] = []

    def gradients(learned: Sequence[str]) -> dict[str, Tensor]:
        before = {name: policy.bank[name].flat.detach().clone() for name in names}
        Learner(policy, config).step([g for g in groups if g.adapter in learned])
        with torch.no_grad():
            for name, flat in before.items():
                policy.bank[name].flat.copy_(flat)
        return {name: gradient(policy.bank[name].flat).clone() for name in learned}

    route = policy.bank.route

    def watched(adapters: Sequence[str | None]):  # type: ignore[no-untyped-def]
        seen.append(set(adapters))
        return route(adapters)

    policy.bank.route = watched  # type: ignore[method-assign]
    mixed = gradients(names)
    assert set(names) <= set.union(*seen)
    assert any(len(tags - {None}) > 1 for tags in seen), "no micro-batch was mixed"
    for name in names:
        alone = gradients([name])[name]
        assert alone.any()
        assert relative_error(mixed[name], alone) < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        assert relative_error(mixed[name], 2 * alone) > 0.3
