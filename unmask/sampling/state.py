"""The state of a generation: rows of tokens, partly masked, and all that their next step depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask.ops import state as ops_state
from unmask.ops.state import COMPLETE, EXHAUSTED, POISONED, RUNNING

__all__ = ["COMPLETE", "EXHAUSTED", "PAUSED", "POISONED", "RUNNING", "State"]

PAUSED = 4
"""The row takes no part in this step; see :meth:`unmask.sampling.cache.CachePlan.held`."""


@dataclass
class State(ops_state.State):
    """N rows of T tokens, of which L positions from ``start`` on are the buffer being filled.

    :func:`unmask.sampling.step.observe` and :func:`unmask.sampling.step.commit` read everything from here, so that
    a serving engine's block is a state like any other.
    """

    mask_token_id: int = -1
    """The id of a position still to be filled. It is never committed."""
    attention: Tensor | None = None
    """(N, T) bool, False on left padding; None if there is none."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a row once everything before them is committed."""
    max_steps: int = 0
    """Forwards after which an unfinished row stops."""
    horizon: int = 0
    """Tokens of a whole completion, by which a policy's time is measured: L, or more if this is one block of it."""
    seed: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    """(1,) int64 on the device: the key of every draw."""
    alpha: Tensor | None = None
    """(N,) float32: what is asked of a conditioned policy; None for other policies."""
    condition: Tensor | None = None
    """(N, C) float32: what the policy's ``condition`` makes of ``alpha``, the same in all steps."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the policy remembers of these rows, tensors of one entry per row."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one entry per row, by field name."""
        for name in ("tokens", "mask", "allowed", "rows", "attention", "alpha", "condition"):
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def rearranged(self, whole: State, rows: Tensor, keep: Tensor) -> State:
        """The state of ``rows`` (R,) of ``whole``, of which the first are rows ``keep`` (K,) of this one.

        What the policy remembers of the kept rows comes along. New rows begin with zeros.
        """
        fresh = rows.shape[0] - keep.shape[0]
        state = whole.take(rows)
        state.memory = {
            name: torch.cat((value[keep], value.new_zeros((fresh, *value.shape[1:]))))
            for name, value in self.memory.items()
            if isinstance(value, Tensor)
        }
        return state

    def positions(self) -> Tensor:
        """(N, BL) int64 buffer positions of each row's active block; past the end, the last position again."""
        return positions_from(self.block * self.block_length - self.phase, self.block_length, self.length)


def positions_from(first: Tensor, width: int, length: int) -> Tensor:
    """(N, width) int64 positions from ``first`` (N,) on, within a buffer of ``length``: past an end, that end again."""
    offsets = torch.arange(width, device=first.device)
    return (first[:, None] + offsets).clamp(0, length - 1)


def condition_of(policy: Any, alpha: Tensor) -> Tensor | None:
    """(N, C): what ``policy`` makes of ``alpha`` (N,), computed once per distinct value.

    A matrix product over another number of rows may round differently. So each value is computed by itself, and a
    row gets the same condition in any batch.
    """
    values, inverse = alpha.unique(return_inverse=True)
    parts = [policy.condition(value[None]) for value in values]
    if not parts or parts[0] is None:
        return None
    return torch.cat(parts)[inverse]


def undefined_rows(state: State) -> list[int]:
    """Rows whose logits were undefined (NaN or +inf) where a token had to be committed. Waits for the device."""
    return (state.status == POISONED).nonzero().flatten().tolist()
