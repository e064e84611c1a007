"""``calm_``: at which positions a row's distributions have moved by little for some steps, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops import library


def calm_(
    logits: Tensor,
    previous: Tensor,
    calm_for: Tensor,
    steps: Tensor,
    positions: Tensor | None = None,
    *,
    excluded: int = -1,
    bound: float,
    needed: int,
) -> tuple[Tensor, Tensor]:
    """Compare this step's distributions with the last one's, and keep what the next step needs.

    csrc/ops/calm.h has the contract; nothing waits for the device.

    Args:
        logits: (B, S, V) float32, bfloat16 or float16, of each row's active block; rows may be strided.
        previous: the same shape and dtype, contiguous: logits of the last step, overwritten with these.
        calm_for: (B, L) int32, contiguous, zeros at first; updated in place.
        steps: (B,) int64: 0 where a row has just started.
        positions: (B, S) int64, the buffer positions of the logits, ascending; None: all L, in order.
        excluded: a token that no distribution has; -1: none.
        bound: a step is calm if the divergence is below this, in nats.
        needed: how many calm steps in a row are asked for, at least 0.

    Returns:
        (B, L) bool, the positions that have been calm for so long. (B, S) float32, KL(now || before) in nats, +inf
        where there is nothing to compare with.

    Raises TypeError or ValueError naming an argument of the wrong dtype, shape, device, layout or value.
    """
    return library.call("calm_", logits.detach(), previous, calm_for, steps, positions, excluded, bound, needed)


@torch.library.register_fake("unmask::calm_")
def _fake(logits: Tensor, previous: Tensor, calm_for: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(calm_for, dtype=torch.bool), logits.new_empty(logits.shape[:2], dtype=torch.float32)
