"""unmask_: every mode, three steps; by a decision too, and revising. Small enough for the race detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from on_reference import truth
from unmask_cases import EOS, assert_same, random_state, run

from unmask.ops.unmask_ import MODES, REVISED


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


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("mode", ["select", "greedy", "dpls"])
def test_revising(mode: str, everywhere: bool, device: Callable[..., None]) -> None:
    """Commits and revisions, blocks that go on without masks and that end, stop ids that count when they have ended."""
    device(132, wave=3)
    generator = torch.Generator().manual_seed(5)
    state = random_state(generator, 3, 2, 70, 32, 0.9, extra=1)
    state = want = replace(state, editable=state.mask.clone())
    settings = {"mode": mode, "max_steps": 9, "max_post": 2, "eos": (EOS,), "seed": 17, "everywhere": everywhere}
    seen = set()
    for step in range(6):
        tokens = torch.randint(7, 20, (3, 70), generator=generator)
        action = torch.randn(3, 70, generator=generator) + [3, 3, 1, 1][step % 4]
        settings["revise"] = torch.rand(3, 70, generator=generator) < 0.4
        state, rank = run(state, tokens, action, **settings)
        want, want_rank = truth(run, want, tokens, action, **settings)
        assert_same(state, want)
        assert torch.equal(rank, want_rank)
        seen |= set(rank.flatten().tolist()) | {100 + int(post) for post in state.post}
    assert seen >= {REVISED, -1, 0, 101}
