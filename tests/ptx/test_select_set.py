"""select_set: networks, lengths and batches that cut its work in different ways. Small, for the race detector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from set_cases import Problem, compare


@pytest.mark.parametrize(
    ("size", "layers", "length", "batch", "multiprocessors"),
    [
        ((64, 2, 128), 2, 40, 1, 132),  # a block for each tile
        ((48, 3, 48), 1, 70, 2, 3),  # blocks take tiles in turn; heads whose channels do not begin at multiples of 16
        ((16, 8, 16), 3, 20, 7, 2),  # teams take rows in turn
        ((144, 1, 48), 2, 90, 1, 2),  # heads so wide that a block takes 16 keys at a time
    ],
)
def test_select_set(
    size: tuple[int, int, int],
    layers: int,
    length: int,
    batch: int,
    multiprocessors: int,
    device: Callable[..., None],
) -> None:
    device(multiprocessors, 4)
    error, clear, total = compare(Problem.random(size, layers, 2, length, batch, seed=1, runs=4))
    assert error < 1e-5
    assert clear == total > 0
