"""policy_forward: networks, lengths and batches that cut its work in different ways. Small, for race detection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_reference import truth
from policy_cases import inputs, pack, random_network

from unmask.ops import policy_forward

TINY, ODD, SMALL, FULL, WIDE = (16, 1, 16), (48, 2, 48), (64, 2, 128), (128, 2, 192), (144, 1, 48)


@pytest.mark.parametrize("selected", ["all", "some"])
@pytest.mark.parametrize(
    ("size", "k", "length", "batch", "multiprocessors", "wave"),
    [
        (FULL, 1, 40, 1, 6, 4),  # more blocks than some stages have parts
        (SMALL, 20, 40, 2, 1, 1),  # a block takes all parts in turn
        (ODD, 9, 20, 1, 5, 4),  # heads whose channels do not begin at multiples of 16
        (TINY, 1, 5, 17, 4, 4),  # several groups of sequences
        (WIDE, 2, 150, 1, 2, 1),  # weights that stay in global memory, several tiles of keys in a block
    ],
)
def test_policy(
    size: tuple[int, int, int],
    k: int,
    length: int,
    batch: int,
    multiprocessors: int,
    wave: int,
    selected: str,
    device: Callable[..., None],
) -> None:
    device(multiprocessors, wave)
    weights = pack(random_network(*size, k, seed=1))
    mask, confidence, time = inputs(batch, length, k)
    if batch > 1:
        mask[0] = False
    rows = mask if selected == "some" else None
    cond = torch.randn(batch, size[0]) if selected == "some" else None
    got = policy_forward(weights, mask, confidence, time, rows, cond)
    want = truth(policy_forward, weights, mask, confidence, time, rows, cond)
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert (got - want)[finite].abs().max() < 1e-5
