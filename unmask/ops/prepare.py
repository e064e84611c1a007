"""``prepare``: what a step reads of its rows before they change, in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.ops import library
from unmask.ops.state import State


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` says of B rows with a buffer of L positions in blocks of BL."""

    steps: Tensor
    """(B,) int64: a copy of ``state.steps``."""
    time: Tensor
    """(B,) float32: steps, and those before they began to count, divided by the horizon; at most 1."""
    positions: Tensor | None
    """(B, BL) int64: the buffer positions of each row's active block, clamped to the buffer; None: one block is all."""
    places: Tensor | None
    """(B, BL) int64: the same positions in the flattened canvas."""
    sources: Tensor | None
    """(B, L) int64: for each position of the active block the number of its entry in the flattened ``positions``."""
    editable: Tensor | None
    """(B, L) bool: committed tokens that may be revised in this step; None: none ever."""
    read: Tensor
    """(B, L) bool: positions whose logits a rule reads, the allowed ones and these."""
    uniform: Tensor | None
    """(B, L) float32 draws in (0, 1) with the keys of :func:`unmask.ops.unmask_`; None without a seed."""


def prepare(
    state: State, *, horizon: int, edits: bool = False, everywhere: bool = False, seed: Tensor | None = None
) -> Prepared:
    """Read ``state``, which is not changed; nothing waits for the device. csrc/ops/prepare.h has the contract.

    Args:
        horizon: the unit of time in tokens, at least 1.
        edits: whether tokens that are ``state.editable`` may be revised.
        everywhere: whether they may be in any block.
        seed: (1,) int64 on the device of the state, for draws.

    Raises TypeError or ValueError naming an argument of the wrong dtype, shape, device or value.
    """
    editable = state.editable if edits else None
    numbers = (state.start, state.tokens.shape[1], state.block_length, horizon, everywhere)
    said = library.call("prepare", state.rows, state.mask, state.allowed, editable, seed, *numbers)
    steps, time, positions, places, sources, revisable, read, uniform = said
    blocks = state.block_length < state.length
    return Prepared(
        steps=steps,
        time=time,
        positions=positions if blocks else None,
        places=places if blocks else None,
        sources=sources if blocks else None,
        editable=None if editable is None else revisable,
        read=state.allowed if editable is None else read,
        uniform=None if seed is None else uniform,
    )


@torch.library.register_fake("unmask::prepare")
def _fake(
    rows: Tensor,
    mask: Tensor,
    allowed: Tensor,
    editable: Tensor | None,
    seed: Tensor | None,
    start: int,
    canvas_width: int,
    block_length: int,
    horizon: int,
    everywhere: bool,
) -> tuple[Tensor, ...]:
    (batch, length), blocks = mask.shape, block_length < mask.shape[1]

    def make(wanted: bool, width: int, dtype: torch.dtype) -> Tensor:
        return mask.new_empty((batch if wanted else 0, width), dtype=dtype)

    of_block = [make(blocks, width, torch.int64) for width in (block_length, block_length, length)]
    revised = [make(editable is not None, length, torch.bool) for _ in range(2)]
    first = (rows.new_empty(batch), rows.new_empty(batch, dtype=torch.float32))
    return (*first, *of_block, *revised, make(seed is not None, length, torch.float32))
