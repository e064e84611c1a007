"""unmask_: every mode, three steps; by a decision too. Small enough for the race detector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_reference import truth
from unmask_cases import EOS, assert_same, random_state, run

from unmask.ops.unmask_ import MODES


@pytest.mark.parametrize("mode", [*MODES, "decision"])
def test_unmask(mode: str, device: Callable[..., None]) -> None:
    device(132, wave=3)
    generator = torch.Generator().manual_seed(4)
    state = want = random_state(generator, 3, 2, 70, 64, 0.7, extra=1)
    settings = {"mode": "select" if mode == "decision" else mode, "max_steps": 9, "eos": (EOS, 11), "seed": 17}
    for _ in range(3):
        tokens = torch.randint(10, 90, (3, 70), generator=generator)
        action = torch.randn(3, 70, generator=generator) - 1
        action = action > 0 if mode == "decision" else action
        state, rank = run(state, tokens, action, temperature=0.7, **settings)
        want, want_rank = truth(run, want, tokens, action, temperature=0.7, **settings)
        assert_same(state, want)
        assert torch.equal(rank, want_rank)
