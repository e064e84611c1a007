"""prepare: bit by bit against plain torch, and that against loops over positions."""

from __future__ import annotations

import random

import pytest
import torch
from on_reference import plain_torch
from prepare_cases import assert_equals_plain_torch, random_problem

from unmask.ops import prepare
from unmask.ops.random import philox_uniform
from unmask.ops.state import RUNNING


def test_equals_plain_torch(device: torch.device) -> None:
    r, generator, edited = random.Random(1), torch.Generator().manual_seed(1), 0
    for _ in range(80):
        got = assert_equals_plain_torch(*random_problem(r, generator, r.choice([1, 9, 40, 300])), device)
        edited += 0 if got.editable is None else int(got.editable.sum())
    assert edited > 100


@pytest.mark.parametrize("everywhere", [False, True])
def test_against_loops(everywhere: bool, device: torch.device) -> None:
    r, generator = random.Random(2), torch.Generator().manual_seed(2)
    for _ in range(10):
        state, _ = random_problem(r, generator, 20)
        seed, (batch, length), width = torch.tensor([7]), state.mask.shape, state.tokens.shape[1]
        got = prepare(state, horizon=30, edits=True, everywhere=everywhere, seed=seed)
        assert got.steps.equal(state.steps)
        assert got.steps.data_ptr() != state.rows.data_ptr()
        assert got.editable is not None
        assert got.uniform is not None
        for b in range(batch):
            steps, block, phase = (int(x[b]) for x in (state.steps + state.draw_step, state.block, state.phase))
            assert float(got.time[b]) == pytest.approx(min(steps / 30, 1), rel=1e-6)
            begin, running = block * state.block_length - phase, int(state.status[b]) == RUNNING
            inside = [begin <= i < begin + state.block_length for i in range(length)]
            may = [bool(state.editable[b, i]) and not state.mask[b, i] for i in range(length)]  # type: ignore[index]
            revised = [m and running and (everywhere or n) for m, n in zip(may, inside, strict=True)]
            assert got.editable[b].tolist() == revised
            assert got.read[b].tolist() == [x or bool(y) for x, y in zip(revised, state.allowed[b], strict=True)]
            where = torch.arange(length) + state.position[b]
            step = state.forwards[b] + state.draw_step[b]
            assert got.uniform[b].equal(philox_uniform(7, where, step, state.sequence[b]))
            if state.block_length >= length:
                assert got.positions is got.places is got.sources is None
                continue
            assert got.positions is not None
            assert got.places is not None
            assert got.sources is not None
            clamped = [min(max(begin + n, 0), length - 1) for n in range(state.block_length)]
            assert got.positions[b].tolist() == clamped
            assert got.places[b].tolist() == [b * width + state.start + p for p in clamped]
            for i in (i for i in range(length) if inside[i]):
                assert got.positions.flatten()[got.sources[b, i]] == i


def test_what_it_refuses(device: torch.device) -> None:
    state, _ = random_problem(random.Random(3), torch.Generator().manual_seed(3), 9)
    with pytest.raises(ValueError, match="horizon: expected at least 1, got 0"):
        prepare(state, horizon=0)
    with pytest.raises(TypeError, match="seed: expected int64, got float32"):
        prepare(state, horizon=9, seed=torch.zeros(1))
    state.editable = state.rows
    with pytest.raises(TypeError, match="editable: expected bool, got int64"):
        prepare(state, horizon=9, edits=True)


def test_opcheck(kernels: torch.device) -> None:
    state, _ = random_problem(random.Random(4), torch.Generator().manual_seed(4), 9)
    given = [t.to(kernels) for t in (state.rows, state.mask, state.allowed, state.mask, torch.tensor([3]))]
    for block_length, keep in ((4, 5), (9, 3)):
        tensors = [*given[:keep], *[None] * (5 - keep)]
        torch.library.opcheck(torch.ops.unmask.prepare.default, (*tensors, 0, 9, block_length, 9, False))
    with plain_torch():
        assert prepare(state, horizon=9).editable is None
