"""choose: every rule with every score and option. Small enough for the race detector."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from choose_cases import RULES, random_problem, run
from on_reference import plain_torch


@pytest.mark.parametrize("rule", RULES)
def test_choose(rule: str, device: Callable[..., None]) -> None:
    device(132, wave=3)
    r, g = random.Random(rule), torch.Generator().manual_seed(4)
    for length in (1, 40, 90, 290):
        choice, given = random_problem(rule, r, g, 3, length)
        got = run(choice, given)
        with plain_torch():
            want = run(choice, given)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
