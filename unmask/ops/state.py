"""The state of rows being decoded, as :func:`unmask.ops.unmask_` reads it and brings it up to date in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

RUNNING, COMPLETE, EXHAUSTED, POISONED = range(4)
"""Values of a row's status: it goes on, it has no masks left, it is out of steps, its logits were undefined."""

STEPS, REMAINING, BLOCK, STATUS, SEQUENCE, DRAW_STEP, POSITION, PHASE, FORWARDS, POST = range(10)
"""Columns of ``State.rows``, as in csrc/ops/unmask.h."""
COLUMNS = 10

S = TypeVar("S", bound="State")


class _Column:
    """(B,) views of a column of ``State.rows``."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __get__(self, state: State, owner: type[State]) -> Tensor:
        return state.rows[:, self.number]


@dataclass
class State:
    """B rows of T tokens, of which L positions from ``start`` on are the buffer being filled.

    Buffer position i of a row belongs to block ``(i + phase) // block_length``. The active block of a row is the first
    that holds a mask; where tokens are revised, it is a block before that which has not ended. A row is done as soon as
    its status is not RUNNING. Every tensor of the class, and of classes derived from it, has one entry per row.
    """

    tokens: Tensor
    """(B, T) int64. Rows may be strided, the last dimension is contiguous."""
    mask: Tensor
    """(B, L) bool, contiguous: still masked."""
    allowed: Tensor
    """(B, L) bool, contiguous: masked and in the active block of a running row."""
    rows: Tensor
    """(B, 10) int64, contiguous: the integers of each row, in the columns named above."""
    start: int
    block_length: int
    editable: Tensor | None = None
    """(B, L) bool: positions whose tokens may be revised once they are not masked. None: no token is revised."""

    steps = _Column(STEPS)
    """(B,) view: forwards taken while the active block had a mask (NFE)."""
    remaining = _Column(REMAINING)
    """(B,) view: masks left."""
    block = _Column(BLOCK)
    """(B,) view: the active block, the number of blocks if there is none."""
    status = _Column(STATUS)
    """(B,) view: RUNNING, COMPLETE, EXHAUSTED (out of steps) or POISONED (undefined logits)."""
    sequence = _Column(SEQUENCE)
    """(B,) view: the key of the row's draws, which thus do not depend on the rest of the batch."""
    draw_step = _Column(DRAW_STEP)
    """(B,) view: added to ``forwards`` in the key of the draws."""
    position = _Column(POSITION)
    """(B,) view: added to the buffer position in the key of the draws."""
    phase = _Column(PHASE)
    """(B,) view: where in a block the buffer begins, from 0 to ``block_length`` - 1."""
    forwards = _Column(FORWARDS)
    """(B,) view: forwards taken, those that could only revise included."""
    post = _Column(POST)
    """(B,) view: forwards taken since the active block has no mask."""

    @classmethod
    def create(
        cls: type[S],
        tokens: Tensor,
        start: int,
        mask_token_id: int,
        block_length: int,
        phase: Tensor | None = None,
        editable: bool = False,
    ) -> S:
        """State of freshly masked ``tokens`` (B, T); the buffer is everything from ``start`` on.

        ``phase`` (B,) int64 in [0, block_length) is 0 for every row unless given. A row's draws are keyed by its index.
        With ``editable`` the tokens that replace the masks may be revised.
        """
        mask = tokens[:, start:] == mask_token_id
        rows = torch.zeros(tokens.shape[0], COLUMNS, dtype=torch.int64, device=tokens.device)
        rows[:, SEQUENCE] = torch.arange(tokens.shape[0], device=tokens.device)
        if phase is not None:
            rows[:, PHASE] = phase
        state = cls(tokens, mask, torch.zeros_like(mask), rows, start, block_length, mask.clone() if editable else None)
        blocks = state.blocks
        remaining = mask.sum(dim=1)
        first = blocks.gather(1, mask.to(torch.uint8).argmax(dim=1, keepdim=True)).squeeze(1)  # if any is masked
        rows[:, REMAINING] = remaining
        rows[:, BLOCK] = torch.where(remaining > 0, first, state.num_blocks)
        rows[:, STATUS] = torch.where(remaining > 0, RUNNING, COMPLETE)
        state.allowed.copy_(mask & (blocks == rows[:, BLOCK, None]))
        return state

    @property
    def length(self) -> int:
        """L."""
        return self.mask.shape[1]

    @property
    def buffer(self) -> Tensor:
        """(B, L) view of the tokens being filled."""
        return self.tokens[:, self.start : self.start + self.length]

    @property
    def blocks(self) -> Tensor:
        """(B, L) int64: the block of each buffer position."""
        return (torch.arange(self.length, device=self.rows.device) + self.phase[:, None]) // self.block_length

    @property
    def num_blocks(self) -> Tensor:
        """(B,) int64: how many blocks the buffer of each row touches."""
        return (self.length + self.phase + self.block_length - 1) // self.block_length

    @property
    def done(self) -> Tensor:
        """(B,) bool, computed: whether the row has ended, in whatever way."""
        return self.status != RUNNING

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by field name."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield name, value

    def take(self: S, index: Tensor) -> S:
        """A new state of copies of the rows that ``index`` (int64 or bool) names."""
        taken: dict[str, Any] = {name: value[index] for name, value in self.tensors()}
        return replace(self, **taken)

    def put(self: S, index: Tensor, other: S) -> None:
        """Overwrite the rows that ``index`` names with all rows of ``other``."""
        for name, value in other.tensors():
            getattr(self, name)[index] = value
