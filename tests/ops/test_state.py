"""``State``: what it says of fresh rows, against loops over the positions, and its views and copies."""

from __future__ import annotations

import pytest
import torch
from unmask_cases import MASK, assert_same, random_state

from unmask.ops import State


@pytest.mark.parametrize(("length", "block_length"), [(1, 1), (7, 3), (24, 8), (5, 9)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_fresh_state(length: int, block_length: int, share: float) -> None:
    state = random_state(torch.Generator().manual_seed(length), 6, 2, length, block_length, share)
    assert torch.equal(state.buffer, state.tokens[:, 2 : 2 + length])
    for b in range(6):
        phase = int(state.phase[b])
        blocks = [(i + phase) // block_length for i in range(length)]
        masked = [i for i in range(length) if state.buffer[b, i] == MASK]
        assert state.blocks[b].tolist() == blocks
        assert state.num_blocks[b] == len(set(range(blocks[-1] + 1)))
        assert state.mask[b].nonzero().flatten().tolist() == masked
        active = min((blocks[i] for i in masked), default=blocks[-1] + 1)
        assert state.block[b] == active
        assert state.allowed[b].nonzero().flatten().tolist() == [i for i in masked if blocks[i] == active]
        assert state.remaining[b] == len(masked)
        assert state.status[b] == (0 if masked else 1)
        assert state.done[b] == (not masked)
        assert state.steps[b] == 0


def test_columns_are_views_and_rows_are_keyed_by_their_index() -> None:
    state = State.create(torch.full((3, 4), MASK), 1, MASK, 2)
    assert state.rows.tolist() == [[0, 3, 0, 0, b, *[0] * 5] for b in range(3)]
    names = ("steps", "remaining", "block", "status", "sequence", "draw_step", "position", "phase", "forwards", "post")
    for column, name in enumerate(names):
        getattr(state, name).fill_(10 + column)
    assert state.rows.tolist() == [list(range(10, 20))] * 3


def test_take_copies_and_put_writes() -> None:
    state = random_state(torch.Generator().manual_seed(0), 5, 1, 6, 4, 0.5)
    before = state.take(torch.arange(5))
    some = state.take(torch.tensor([4, 0]))
    assert torch.equal(some.tokens, state.tokens[[4, 0]])
    some.tokens.fill_(1)
    some.steps.fill_(3)
    assert_same(state, before)
    state.put(torch.tensor([2, 4]), some)
    assert state.steps.tolist() == [0, 0, 3, 0, 3]
    assert state.sequence[[2, 4]].tolist() == before.sequence[[4, 0]].tolist()
    assert (state.tokens[[2, 4]] == 1).all()
    assert_same(state.take(torch.tensor([0, 1, 3])), before.take(torch.tensor([0, 1, 3])))
