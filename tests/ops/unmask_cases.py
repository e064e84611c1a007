"""States, steps and comparisons shared by the tests of ``unmask_``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.ops import State, unmask_

MASK, EOS = 99, 7


def random_state(
    generator: torch.Generator, batch: int, start: int, length: int, block_length: int, share: float, extra: int = 0
) -> State:
    """Canvases with about ``share`` of the buffer masked, any phase, and keys of draws that differ."""
    canvas = torch.randint(10, 90, (batch, start + length), generator=generator)
    canvas[:, start:][torch.rand(batch, length, generator=generator) < share] = MASK
    phase = torch.randint(0, block_length, (batch,), generator=generator)
    state = State.create(canvas, start, MASK, block_length, phase)
    for column in (state.sequence, state.draw_step, state.position):
        column.copy_(torch.randint(0, 2**40, (batch,), generator=generator))
    behind = torch.full((batch, extra), 5)  # of the canvas, behind the buffer
    return replace(state, tokens=torch.cat((canvas, behind), dim=1))


def one_row(buffer: list[int], block_length: int = 0, phase: int = 0, **changes: list[bool]) -> State:
    """A batch of one, without a prompt."""
    state = State.create(torch.tensor([buffer]), 0, MASK, block_length or len(buffer), torch.tensor([phase]))
    return replace(state, **{name: torch.tensor([value]) for name, value in changes.items()})  # type: ignore[arg-type]


def many_rows(length: int, batch: int) -> State:
    """Fully masked rows of one block."""
    return State.create(torch.full((batch, length), MASK), 0, MASK, length)


def moved(state: State, device: torch.device | str) -> State:
    """A copy on another device."""
    tensors: dict[str, Any] = {name: value.to(device, copy=True) for name, value in state.tensors()}
    return replace(state, **tensors)


def run(
    state: State, candidates: Tensor, action: Tensor, device: torch.device | str = "cpu", **settings: Any
) -> tuple[State, Tensor]:
    """A new state after one step, and the rank, both on the CPU."""
    there = moved(state, device)
    settings = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in settings.items()}
    rank = unmask_(there, candidates.to(device), action.to(device), **settings)
    assert rank.dtype == torch.int32
    return moved(there, "cpu"), rank.cpu()


def assert_same(got: State, want: State) -> None:
    for name, value in want.tensors():
        assert torch.equal(getattr(got, name), value), f"{name}: {getattr(got, name).tolist()} != {value.tolist()}"
