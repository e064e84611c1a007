"""calm_: every dtype, rows of any alignment, more and fewer elements than threads. Small, for the race detector."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from calm_cases import assert_matches, random_problem


@pytest.mark.parametrize("vocab", [3, 300, 4500])
def test_calm(vocab: int, device: Callable[..., None]) -> None:
    device(132, wave=3)
    r, generator = random.Random(vocab), torch.Generator().manual_seed(vocab)
    for _ in range(6):
        assert_matches(random_problem(r, generator, vocab))
