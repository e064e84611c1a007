"""prepare: whole buffers and blocks, with revisions and draws. Small enough for the race detector."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from prepare_cases import assert_equals_plain_torch, random_problem


def test_prepare(device: Callable[..., None]) -> None:
    device(132, wave=3)
    r, generator = random.Random(5), torch.Generator().manual_seed(5)
    for length in (1, 40, 90, 290, 40, 90):
        assert_equals_plain_torch(*random_problem(r, generator, length))
