"""Fused attention: its masks, and that it is used only where it is verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rl_lora.attention import flex
from rl_lora.attention.padded import padded_attention
from rl_lora.attention.tree import SpanTree
from rl_lora.kernels.attention_options import AttentionOptions
from tests.attention.dense import OPTIONS, allowed, walk


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seed", range(5))
def test_two_numbers_a_token_say_who_sees_whom(seed, window):
    tree = SpanTree(walk(np.random.default_rng(seed), 12))
    assert tree.end is not None
    i = torch.arange(tree.n_tokens)
    seen = flex.mask_mod(tree.end, tree.positions[0], window)(i[:1], i[:1], i[:, None], i[None])
    assert torch.equal(seen, allowed(tree, window))


def whole_blocks(mask: BlockMask) -> list[set[int]]:
    """Of each block of queries, the blocks of keys that it sees all of."""
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    counts, indices = mask.full_kv_num_blocks[0, 0].tolist(), mask.full_kv_indices[0, 0].tolist()
    return [set(row[:n]) for row, n in zip(indices, counts, strict=True)]


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_those_that_torch_finds_by_looking_at_all_pairs(seed, window):
    rng = np.random.default_rng(seed)
    spans = walk(rng, 14)
    lengths = [length * int(rng.integers(1, 60)) for _, length, _ in spans]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    tree = SpanTree([(start, n, parent) for start, n, (_, _, parent) in zip(starts, lengths, spans, strict=True)])
    assert tree.end is not None
    mod = flex.mask_mod(tree.end, tree.positions[0], window)
    expected = create_block_mask(mod, None, None, tree.n_tokens, tree.n_tokens, device="cpu")
    found = flex.block_mask(tree, window)
    if window is None:
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert whole_blocks(found) == whole_blocks(expected)
    else:  # none of those that are needed is left out, and none is taken for whole that is not
        assert (found.to_dense() >= expected.to_dense()).all()
        assert all(mine <= theirs for mine, theirs in zip(whole_blocks(found), whole_blocks(expected), strict=True))


UNFUSED = "ignore:flex_attention called without torch.compile"


@pytest.mark.filterwarnings(UNFUSED)
@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("seed", range(3))
def test_fused_attention_is_our_own(seed, options):
    """Its forward pass, which runs on a CPU too; on a GPU `flex.verified` compares the gradients as well."""
    tree = SpanTree(walk(np.random.default_rng(seed), 9))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, tree.n_tokens, 16, generator=g) for h in (4, 2, 2))
    torch.testing.assert_close(flex.fused_attention(tree, q, k, v, options), padded_attention(tree, q, k, v, options))


@pytest.mark.filterwarnings(UNFUSED)
def test_fused_attention_is_used_only_where_it_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, options = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), AttentionOptions(0.25)
    flex._fast_paths.clear()
    assert flex.verified(q, k, k, options)
    flex._fast_paths.clear()
    with monkeypatch.context() as patch:
        patch.setattr(flex, "padded_attention", lambda *args: 1.2 * padded_attention(*args))
        with pytest.warns(UserWarning, match="its output differs from our own"):
            assert not flex.verified(q, k, k, options)
    assert not flex.verified(q, k, k, options), "the verdict is kept"
    flex._fast_paths.clear()
