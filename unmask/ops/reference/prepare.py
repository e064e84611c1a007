"""``prepare`` in plain torch, by the contract of csrc/ops/prepare.h."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.random import philox_uniform
from unmask.ops.reference.checks import check, check_seed, check_tensors
from unmask.ops.state import COLUMNS, RUNNING


@fallback
def prepare(
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
    """Arguments and result of the op."""
    check(mask.ndim == 2 and mask.shape[1] >= 1, "mask", "shape (B, L) with L >= 1", tuple(mask.shape))
    check(block_length >= 1, "block_length", "at least 1", block_length)
    check(horizon >= 1, "horizon", "at least 1", horizon)
    check_tensors(
        {"C": COLUMNS},
        mask,
        mask=(mask, torch.bool, "BL"),
        rows=(rows, torch.int64, "BC"),
        allowed=(allowed, torch.bool, "BL"),
        editable=(editable, torch.bool, "BL"),
    )
    check_seed(seed, seed is not None, mask)
    steps, _, block, status, sequence, draw_step, position, phase, forwards, _ = rows.unbind(1)
    length = mask.shape[1]
    index, first = torch.arange(length, device=mask.device), (block * block_length - phase)[:, None]
    # A tensor of one number makes the quotient float32, whatever the default dtype.
    time = ((steps + draw_step) / torch.tensor(horizon, dtype=torch.float32)).clamp_max(1.0)
    none = mask.new_empty((0, length))
    positions = places = mask.new_empty((0, block_length), dtype=torch.int64)
    sources, revisable, read, uniform = none.long(), none, none, none.float()
    number = torch.arange(len(rows), device=mask.device)[:, None]
    if block_length < length:
        positions = (first + torch.arange(block_length, device=mask.device)).clamp(0, length - 1)
        places, sources = positions + start + number * canvas_width, index + number * block_length - first
    if editable is not None:
        revisable = editable & ~mask & (status == RUNNING)[:, None]
        if not everywhere:
            revisable &= (index + phase[:, None]) // block_length == block[:, None]
        read = allowed | revisable
    if seed is not None:
        uniform = philox_uniform(seed, index + position[:, None], (forwards + draw_step)[:, None], sequence[:, None])
    return steps.clone(), time, positions, places, sources, revisable, read, uniform
