"""The state of a generation: rows of partly masked tokens, and all that their next step depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unmask.ops import Prepared
from unmask.ops import state as ops_state
from unmask.ops.state import COMPLETE, EXHAUSTED, POISONED, RUNNING

__all__ = ["COMPLETE", "EXHAUSTED", "PAUSED", "POISONED", "RUNNING", "State"]

PAUSED = 4
"""A row that does not take this step; see :meth:`unmask.sampling.cache.CachePlan.held`."""


@dataclass
class State(ops_state.State):
    """N rows of T tokens, of which L positions from ``start`` on are the buffer being filled.

    :func:`unmask.sampling.step.observe` and :func:`unmask.sampling.step.commit` need nothing else, so that a serving
    engine can use them on a state of one block.
    """

    mask_token_id: int = -1
    """The id of a position still to be filled. It is never committed."""
    attention: Tensor | None = None
    """(N, T) bool, False on left padding; None if there is none."""
    prompt: Tensor | None = None
    """(N, T) bool: the given tokens, which a second forward sees masked; None: there is none (``cfg_scale`` 0)."""
    stop_ids: tuple[int, ...] = ()
    """Ids that finish a row once they and everything before them are committed."""
    end_ids: tuple[int, ...] = ()
    """Ids that end a completion, whether or not they finish the row; what policies know as ``stop_ids``."""
    max_steps: int = 0
    """Steps after which an unfinished row stops."""
    max_post: int | None = None
    """Forwards on a block without masks, in which its tokens may be revised; None: the block ends with its masks."""
    everywhere: bool = False
    """Whether tokens of the blocks before the active one may be revised as well."""
    settled_stop: bool = False
    """Whether a stop id counts only in a block that has ended."""
    grid: int = 0
    """Tokens per attention block, for models whose tokens see no later block; 0: the model sees the whole canvas."""
    infill: bool = False
    """Whether the buffer is a whole text with holes, which no end of sequence ends."""
    horizon: int = 0
    """Tokens of the whole completion, the unit of a policy's time: L, or more if this is one block of it."""
    seed: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    """(1,) int64 on the device, the seed of every draw."""
    alpha: Tensor | None = None
    """(N,) float32: the alpha of each row; None for unconditioned policies."""
    shift: Tensor | None = None
    """(N, 1) float32, added to a learned policy's logits; None: nothing."""
    condition: Tensor | None = None
    """(N, C) float32: what the policy's ``condition`` computes from ``alpha``, the same in all steps."""
    memory: dict[str, Any] = field(default_factory=dict)
    """The policy's memory of these rows: tensors with one entry per row."""
    ready: Prepared | None = None
    """What :func:`unmask.sampling.step.prepared` says, while a step is taken; None: it has not been asked."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with one entry per row, by field name."""
        optional = ("editable", "attention", "prompt", "alpha", "shift", "condition")
        for name in ("tokens", "mask", "allowed", "rows", *optional):
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def rearranged(self, whole: State, rows: Tensor, keep: Tensor) -> State:
        """The state of ``rows`` (R,) of ``whole``, of which the first K are rows ``keep`` (K,) of this state.

        The policy's memory of the kept rows is kept. That of new rows begins with zeros.
        """
        fresh = rows.shape[0] - keep.shape[0]
        state = whole.take(rows)
        state.memory = {
            name: torch.cat((value[keep], value.new_zeros((fresh, *value.shape[1:]))))
            for name, value in self.memory.items()
            if isinstance(value, Tensor)
        }
        return state

    def raise_if_undefined(self) -> None:
        """FloatingPointError for rows whose logits were undefined where a token had to be committed."""
        if rows := (self.status == POISONED).nonzero().flatten().tolist():
            raise FloatingPointError(
                f"the model's logits were undefined (NaN or +inf) where a token had to be committed, in rows {rows}"
            )

    def take(self, index: Tensor) -> State:
        return replace(super().take(index), ready=None)

    def positions(self) -> Tensor:
        """(N, BL) int64 buffer positions of each row's active block; past the end, the last position repeats."""
        if self.ready is not None and self.ready.positions is not None:
            return self.ready.positions
        return positions_from(self.block * self.block_length - self.phase, self.block_length, self.length)


def positions_from(first: Tensor, width: int, length: int) -> Tensor:
    """(N, width) int64 positions from ``first`` (N,) on, clamped to a buffer of ``length``."""
    offsets = torch.arange(width, device=first.device)
    return (first[:, None] + offsets).clamp(0, length - 1)
