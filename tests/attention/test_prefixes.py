"""The prefixes that prompts share, and blocks that share keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_lora.attention.prefixes import common_prefix, find_shared_prefixes, prefix_of
from rl_lora.attention.shared_prefix import Sharing


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
