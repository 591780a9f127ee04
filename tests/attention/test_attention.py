"""Attention over shared beginnings is attention: against a dense float64 softmax, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rl_lora.attention import flex, kv_cache
from rl_lora.attention import tree as tree_module
from rl_lora.attention.interface import attend_on_tree
from rl_lora.attention.kv_cache import DecodeCache, KeyValues
from rl_lora.attention.padded import padded_attention
from rl_lora.attention.prefixes import common_prefix, find_shared_prefixes, prefix_of
from rl_lora.attention.shared_prefix import Sharing
from rl_lora.attention.tree import SpanTree, ends
from rl_lora.kernels.attention_options import AttentionOptions


def random_spans(rng: np.random.Generator, n: int) -> list[tuple[int, int, int]]:
    """A forest at most three deep, in an order in which parents come first and siblings need not be neighbours."""
    spans: list[tuple[int, int, int]] = []
    depth: list[int] = []
    start = 0
    for i in range(n):
        parents = [j for j in range(i) if depth[j] < 2]
        parent = int(rng.choice([-1, *parents]))
        length = int(rng.integers(1, 7))
        spans.append((start, length, parent))
        depth.append(0 if parent < 0 else depth[parent] + 1)
        start += length
    return spans


def allowed(tree: SpanTree, window: int | None) -> Tensor:
    """bool (N, N): own span up to here, and all ancestors."""
    in_line = np.eye(len(tree.spans), dtype=bool)  # whether a span is the other, or behind it
    for i, (_, _, parent) in enumerate(tree.spans):
        if parent >= 0:
            in_line[i] |= in_line[parent]
    span_of = np.repeat(np.arange(len(tree.spans)), [length for _, length, _ in tree.spans])
    mask = torch.from_numpy(in_line[span_of[:, None], span_of]).tril()
    position = tree.positions[0]
    return mask if window is None else mask & (position[:, None] - position < window)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """(H, N, D) x (H_kv, M, D) in float64."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ v
    return torch.softmax(scores, -1) @ v


OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=4),
    AttentionOptions(0.5, softcap=2.0),
    AttentionOptions(0.3, window=3, softcap=1.5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1 << 25, 60])
@pytest.mark.parametrize("seed", range(3))
def test_tree_attention_and_its_gradient_are_those_of_a_dense_mask(seed, chunk, options, monkeypatch):
    monkeypatch.setattr(tree_module, "CHUNK_ELEMENTS", chunk)  # 60: single blocks, and single queries of them
    rng = np.random.default_rng(seed)
    tree = SpanTree(random_spans(rng, 9))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, tree.n_tokens, 5, generator=g, requires_grad=True) for h in (4, 2, 2))
    out = attend_on_tree(tree, 0, q, k, v, options)
    grad = torch.randn(out.shape, generator=g)
    out.backward(grad)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = dense(q64[0], k64[0], v64[0], allowed(tree, options.window), options)
    expected.backward(grad[0].double())
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-4)
    for x, x64 in ((q, q64), (k, k64), (v, v64)):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-4)


def walk(rng: np.random.Generator, n: int) -> list[tuple[int, int, int]]:
    """A forest whose spans lie in the order of a walk through it, as packing lays them."""
    spans: list[tuple[int, int, int]] = []
    path: list[int] = []
    start = 0
    for i in range(n):
        del path[int(rng.integers(0, min(len(path), 3) + 1)) :]
        length = int(rng.integers(1, 7))
        spans.append((start, length, path[-1] if path else -1))
        path.append(i)
        start += length
    return spans


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


def test_spans_out_of_a_walks_order_are_known_as_such():
    assert ends([(0, 2, -1), (2, 2, -1), (4, 1, 0)]) is None  # a child that is not behind its parent
    assert ends([(2, 2, -1), (0, 2, -1)]) is None  # tokens in another order than spans
    found = ends([(0, 2, -1), (2, 3, 0), (5, 1, 0), (6, 2, -1)])
    assert found is not None
    assert found.tolist() == [6, 6, 5, 5, 5, 6, 8, 8]


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


def test_bfloat16_is_float64_within_its_rounding():
    rng = np.random.default_rng(0)
    tree = SpanTree(random_spans(rng, 12))
    q, k, v = (torch.randn(1, h, tree.n_tokens, 16).bfloat16().requires_grad_() for h in (4, 2, 2))
    out = attend_on_tree(tree, 0, q, k, v, AttentionOptions(0.25))
    out.sum().backward()
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = dense(q64[0], k64[0], v64[0], allowed(tree, None), AttentionOptions(0.25))
    expected.sum().backward()
    assert (out[0] - expected).abs().max() < 0.03
    for x, x64 in ((q, q64), (k, k64), (v, v64)):
        assert x.grad is not None
        assert x64.grad is not None
        assert (x.grad - x64.grad).abs().mean() < 0.02 * x64.grad.abs().mean()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("short_prefix", [0, 4, 64])
def test_rows_decode_what_a_dense_mask_gives_whatever_came_before(options, block, short_prefix, monkeypatch):
    """Rows come, read one or several tokens, leave, others come: all of them agree with dense attention each time."""
    monkeypatch.setattr(kv_cache, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    H, H_kv, D = 4, 2, 5

    def kv(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(H_kv, n, D, generator=g), torch.randn(H_kv, n, D, generator=g)

    def nodes(parts: list[tuple[Tensor, Tensor]]) -> KeyValues:
        lengths = np.array([part[0].shape[1] for part in parts])
        keys, values = torch.full((2, len(parts), H_kv, lengths.max(), D), 7.0)
        for i, (k, v) in enumerate(parts):
            keys[i, :, : lengths[i]], values[i, :, : lengths[i]] = k, v
        return KeyValues([keys], [values], lengths)

    prefixes = [kv(4), kv(6)]
    decode = DecodeCache("cpu", short_prefix=short_prefix)
    decode.prefixes = nodes(prefixes)
    decode.prefixes.append_empty()
    prefixes.append(kv(0))
    rows: list[tuple[Tensor, Tensor]] = []  # of each row, everything it has read

    def admit(prefix_of_prompt: list[int], prompt_of_row: list[int]) -> None:
        prompts = [kv(int(rng.integers(1, 6))) for _ in prefix_of_prompt]
        decode.admit(nodes(prompts), np.array(prefix_of_prompt), np.array(prompt_of_row))
        for p in prompt_of_row:
            pair = zip(prefixes[prefix_of_prompt[p]], prompts[p], strict=True)
            rows.append(tuple(torch.cat(x, 1) for x in pair))  # type: ignore[arg-type]

    def read(n: int, some: list[int] | None = None, lengths: list[int] | None = None) -> None:
        chosen = list(range(len(rows))) if some is None else some
        lengths = lengths or [n] * len(chosen)
        index = None if some is None else np.array(some)
        positions = decode.begin(n, index)
        q = torch.randn(len(chosen), H, n, D, generator=g)
        k, v = torch.randn(2, len(chosen), H_kv, n, D, generator=g)
        out = decode.attend(0, q, *decode.update(k, v, 0), options)
        decode.advance(np.array(lengths) if index is not None else n, index)
        for i, row in enumerate(chosen):
            m = lengths[i]
            rows[row] = torch.cat([rows[row][0], k[i, :, :m]], 1), torch.cat([rows[row][1], v[i, :, :m]], 1)
            keys, values = rows[row]
            at = torch.arange(keys.shape[1] - m, keys.shape[1])[:, None]
            j = torch.arange(keys.shape[1])
            mask = (j <= at) if options.window is None else (j <= at) & (at - j < options.window)
            expected = dense(q[i, :, :m].double(), keys.double(), values.double(), mask, options)
            assert positions[i, :m].tolist() == at[:, 0].tolist()
            torch.testing.assert_close(out[i, :, :m].double(), expected, atol=1e-5, rtol=1e-4)

    def keep(which: list[int]) -> None:
        decode.keep(np.array(which, np.int64))
        rows[:] = [rows[i] for i in which]

    admit([0, 1], [0, 0, 1])
    read(1)
    read(1)
    keep([1, 2])
    admit([2, 0], [0, 1, 1])
    read(1)
    read(3, [0, 3], [3, 1])  # next turns of different lengths
    read(1)
    keep([0, 3])
    read(2)
    keep([])
    admit([1], [0])
    read(1)


@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [1, 0, 1, 1], [2, 0, 0, 2, 2], [0]])
def test_sharing_brings_blocks_together_and_apart(owner):
    sharing = Sharing(np.array(owner), 3)
    x = torch.randn(len(owner), 2, 3, 4)
    together = sharing.together(x, zero=True)
    assert torch.equal(sharing.apart(together), x)
    for node in range(3):
        mine = sum((x[i] for i, o in enumerate(owner) if o == node), torch.zeros(2, 3, 4))
        parts = together[node].view(2, sharing.G, 3, 4).sum(1)
        torch.testing.assert_close(parts, mine)


def test_shared_prefixes_are_what_prompts_of_one_adapter_begin_with():
    head = tuple(range(100, 120))
    prompts = [("a", (*head, 1, 2)), ("a", (*head, 3)), ("b", (*head, 1)), (None, (1, 2, 3)), ("a", (*head, 1))]
    assert find_shared_prefixes(prompts) == [("a", head)]
    assert prefix_of([("a", head)], "a", (*head, 9)) == 0
    assert prefix_of([("a", head)], "a", head) is None  # nothing would be left to draw behind
    assert prefix_of([("a", head)], "b", (*head, 9)) is None
    assert find_shared_prefixes([("a", head), ("a", (*head, 1))]) == [("a", head[:-1])]
    assert find_shared_prefixes([("a", head), ("a", head)]) == []
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
