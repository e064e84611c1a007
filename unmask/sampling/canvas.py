"""The canvas: token ids of all rows and the state of their decoding, updated in place by ``ops.unmask_``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, COMPLETE, EXHAUSTED, POISONED = range(4)  # values of Canvas.status, as in csrc/ops/unmask.h


@dataclass
class Canvas:
    """N rows of T tokens, of which positions ``start`` to ``start + length`` are the buffer being filled."""

    tokens: Tensor
    """(N, T) int64."""
    attention: Tensor | None
    """(N, T) bool, False on left padding; None if there is none."""
    sequence: Tensor
    """(N,) int64: which prompt a row belongs to; keys its random draws, whatever the batch."""
    mask: Tensor
    """(N, L) bool: still masked."""
    allowed: Tensor
    """(N, L) bool: masked, in the active block, row unfinished."""
    steps: Tensor
    """(N,) int64: forwards taken (NFE)."""
    remaining: Tensor
    """(N,) int64: masks left."""
    block: Tensor
    """(N,) int64: active block."""
    done: Tensor
    """(N,) bool."""
    status: Tensor
    """(N,) int32: RUNNING, COMPLETE, EXHAUSTED (max_steps reached) or POISONED (undefined logits)."""
    start: int
    block_length: int
    alpha: Tensor | None = None
    """(N,) float32: the trade-off asked of a policy conditioned on it; None for other policies."""
    dial: Tensor | None = None
    """(N, C) float32: what such a policy makes of it, the same in all steps."""

    @classmethod
    def create(
        cls, tokens: Tensor, attention: Tensor | None, start: int, mask_token_id: int, block_length: int
    ) -> Canvas:
        """State for freshly masked ``tokens`` (N, T); the buffer is everything from ``start`` on."""
        rows, device = tokens.shape[0], tokens.device
        mask = tokens[:, start:] == mask_token_id
        length = mask.shape[1]
        remaining = mask.sum(dim=1)
        blocks = torch.arange(length, device=device) // block_length  # (L,) block of each position
        first_masked = mask.to(torch.uint8).argmax(dim=1)  # 0 where nothing is masked
        num_blocks = -(-length // block_length)
        block = torch.where(remaining > 0, first_masked // block_length, num_blocks)
        return cls(
            tokens=tokens,
            attention=attention,
            sequence=torch.arange(rows, device=device),
            mask=mask,
            allowed=mask & (blocks == block[:, None]),
            steps=torch.zeros(rows, dtype=torch.int64, device=device),
            remaining=remaining,
            block=block,
            done=remaining == 0,
            status=torch.where(remaining == 0, COMPLETE, RUNNING).to(torch.int32),
            start=start,
            block_length=block_length,
        )

    @property
    def length(self) -> int:
        """L."""
        return self.mask.shape[1]

    @property
    def buffer(self) -> Tensor:
        """(N, L) view of the tokens being filled."""
        return self.tokens[:, self.start :]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every per-row tensor by field name."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield name, value

    def take(self, rows: Tensor) -> Canvas:
        """A new canvas of copies of some rows."""
        state = dict(vars(self))
        state.update((name, value[rows]) for name, value in self.tensors())
        return Canvas(**state)

    def put(self, rows: Tensor, other: Canvas) -> None:
        """Overwrite ``rows`` of this canvas with all rows of ``other``."""
        for name, value in other.tensors():
            getattr(self, name)[rows] = value
