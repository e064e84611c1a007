"""``unmask_`` in plain torch, by the contract of csrc/ops/unmask.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.random import ACTION_INDEX, STOP_INDEX, philox_uniform
from unmask.ops.reference.checks import check, check_seed, check_tensors, wide_dtype
from unmask.ops.state import COLUMNS, COMPLETE, EXHAUSTED, POISONED, RUNNING
from unmask.ops.unmask_ import REVISED

SELECT, BERNOULLI, BERNOULLI_ARGMAX, GREEDY, DPLS = range(5)
_DRAWING = (BERNOULLI, BERNOULLI_ARGMAX, DPLS)


class Arguments(NamedTuple):
    """What the op takes, in its order."""

    tokens: Tensor
    mask: Tensor
    allowed: Tensor
    rows: Tensor
    candidates: Tensor
    action: Tensor
    start: int
    block_length: int
    max_steps: int
    action_mode: int
    eos: Sequence[int]
    temperature: float
    scale: float
    stop_logit: float
    seed: Tensor | None
    revise: Tensor | None
    editable: Tensor | None
    max_post: int | None
    everywhere: bool
    settled_stop: bool

    def check(self) -> None:
        """Raises TypeError or ValueError for what the op does not take."""
        mask, tokens = self.mask, self.tokens
        check(mask.ndim == 2 and mask.shape[1] >= 1, "mask", "shape (B, L) with L >= 1", tuple(mask.shape))
        decided = self.action_mode == SELECT and self.action.dtype == torch.bool
        kinds = {"tokens": "BT", "mask": "BL", "allowed": "BL", "rows": "BC", "candidates": "BL", "action": "BL"}
        kinds |= {"revise": "BL", "editable": "BL"}
        dtypes = dict.fromkeys(("mask", "allowed", "revise", "editable"), torch.bool)
        dtypes["action"] = torch.bool if decided else torch.float32
        tensors = {n: (getattr(self, n), dtypes.get(n, torch.int64), letters) for n, letters in kinds.items()}
        check_tensors({"C": COLUMNS}, tokens, **tensors)
        for name in ("mask", "allowed", "rows"):
            tensor = getattr(self, name)
            check(tensor.is_contiguous(), name, "a contiguous tensor, as it is written in place", tensor.stride())
        (batch, width), stride, length = tokens.shape, tokens.stride(), mask.shape[1]
        apart = (width <= 1 or stride[1] == 1) and (batch <= 1 or abs(stride[0]) >= width)
        check(apart, "tokens", "contiguous rows that do not overlap, as they are written in place", stride)
        check_seed(self.seed, self.action_mode in _DRAWING, tokens)
        if self.revise is not None and self.editable is None:
            raise TypeError("editable: expected a bool tensor for revise, got None")
        check(0 <= self.start <= width - length, "start", f"0 to {width - length}", self.start)
        check(self.block_length >= 1, "block_length", "at least 1", self.block_length)
        check(self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        check((self.max_post or 0) >= 0, "max_post", "at least 0, or None", self.max_post)
        check(len(self.eos) <= 16, "eos", "at most 16 ids", len(self.eos))
        check(min(self.eos, default=0) >= 0, "eos", "ids of at least 0", min(self.eos, default=0))
        check(1e-30 <= self.temperature <= 1e30, "temperature", "1e-30 to 1e30", self.temperature)
        check(0 <= self.scale <= 1e30, "scale", "a number from 0 to 1e30", self.scale)
        check(abs(self.stop_logit) <= 1e30, "stop_logit", "a number from -1e30 to 1e30", self.stop_logit)


@fallback
def unmask_(*arguments: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Arguments, effects and result of the op; probabilities and times are in ``dtype``, the widest unless given."""
    a = Arguments(*arguments)
    a.check()
    dtype, most = dtype or wide_dtype(a.tokens.device), a.max_post or 0
    steps, remaining, block, status, sequence, draw_step, position, phase, forwards, post = a.rows.unbind(1)
    length = a.mask.shape[1]
    index = torch.arange(length, device=a.tokens.device)
    blocks = (index + phase[:, None]) // a.block_length  # (B, L)
    num_blocks = (length + phase + a.block_length - 1) // a.block_length
    running, editing = status == RUNNING, a.max_post is not None
    first = _first_block(a.mask, blocks, num_blocks)
    active = torch.minimum(block, first) if editing else first
    inside = (blocks == active[:, None]) & running[:, None]
    had_mask = (a.mask & inside).any(1) | (not editing)

    def draws(kind: int, at: Tensor) -> Tensor:
        assert a.seed is not None
        where = (at + position[:, None], (forwards + draw_step)[:, None], sequence[:, None])
        return philox_uniform(a.seed, *where, kind).to(dtype)

    utilities = a.action.to(dtype) / (a.temperature if a.action_mode in _DRAWING else 1.0)
    rank = _rank(utilities, a.allowed & a.mask & inside, a.action_mode, a.scale, a.stop_logit, draws)
    buffer = a.tokens[:, a.start : a.start + length]
    if a.revise is not None and a.editable is not None:
        reached = (blocks <= active[:, None]) & running[:, None] if a.everywhere else inside
        rank = rank.masked_fill(a.revise & a.editable & ~a.mask & reached & (buffer != a.candidates), REVISED)
    poisoned = ((rank != -1) & (a.candidates < 0)).any(1)
    rank = rank.masked_fill(poisoned[:, None], -1)
    running &= ~poisoned
    changed, left = rank != -1, a.mask & (rank == -1)
    buffer.copy_(torch.where(changed, a.candidates, buffer))

    first = _first_block(left, blocks, num_blocks)
    goes_on = torch.where(had_mask, most > 0, changed.any(1) & (post + 1 < most)) & (active < first)
    active = torch.where(goes_on, active, first)
    settled = blocks < active[:, None] if editing or a.settled_stop else left.cumsum(1) == 0
    stops = torch.isin(buffer, buffer.new_tensor(list(a.eos))) & settled & running[:, None]
    ended = stops.any(1)
    buffer.copy_(torch.where(left & ended[:, None], buffer.gather(1, _first(stops)[:, None]), buffer))
    left &= ~ended[:, None]
    active = torch.where(ended, num_blocks, active)

    steps += running & had_mask
    forwards += running
    post.copy_(torch.where(running, torch.where(goes_on & ~had_mask & ~ended, post + 1, 0), post))
    ending = torch.where(left.any(1) & (steps >= a.max_steps), EXHAUSTED, RUNNING)
    ending = torch.where(active == num_blocks, COMPLETE, ending)
    status.copy_(torch.where(poisoned, POISONED, torch.where(running, ending, status)))
    remaining.copy_(torch.where(running, left.sum(1), remaining))
    block.copy_(torch.where(running, active, block))
    a.mask.logical_and_(left | ~running[:, None])
    may = left & (blocks == active[:, None]) & (status == RUNNING)[:, None]
    a.allowed.copy_(torch.where((running | poisoned)[:, None], may, a.allowed))
    return rank.to(torch.int32)


def _first(flags: Tensor) -> Tensor:
    """(B,) the position of the first True, 0 if there is none."""
    return flags.to(torch.uint8).argmax(1)


def _first_block(mask: Tensor, blocks: Tensor, num_blocks: Tensor) -> Tensor:
    """(B,) the first block with a mask, the number of blocks if there is none."""
    return torch.where(mask, blocks, num_blocks[:, None]).amin(1)


def _rank(
    utilities: Tensor,
    may: Tensor,
    action_mode: int,
    scale: float,
    stop_logit: float,
    draws: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """(B, L) int64: the order of what is unmasked, -1 elsewhere. ``draws`` gives uniform numbers at positions."""
    index = torch.arange(may.shape[1], device=may.device)
    if action_mode == DPLS:
        # A position arrives after an exponential time of rate exp(utility), STOP so long after the first of them.
        arrivals = torch.log(-torch.log1p(-draws(ACTION_INDEX, index))) - utilities
        stop = torch.log(-torch.log1p(-draws(STOP_INDEX, index[:1]))) - stop_logit
        rank = _race(arrivals.masked_fill(~may, math.nan), stop)
    elif action_mode in (BERNOULLI, BERNOULLI_ARGMAX):
        rank = torch.where(may & (draws(ACTION_INDEX, index) < scale * torch.sigmoid(utilities)), 0, -1)
    else:
        rank = torch.where(may & (utilities > 0), 0, -1)
    if action_mode in (SELECT, BERNOULLI):
        return rank
    # One position is certain: the highest utility, and where there is nothing but NaN the first allowed.
    lost = may.any(1, keepdim=True) & (rank < 0).all(1, keepdim=True)
    known = may & ~utilities.isnan()
    best = utilities.masked_fill(~known, -math.inf).amax(1, keepdim=True)
    among = torch.where(known.any(1, keepdim=True), known & (utilities == best), may)
    return torch.where(lost & (index == _first(among)[:, None]), 0, rank)


def _race(arrivals: Tensor, stop: Tensor) -> Tensor:
    """(B, L) ranks of those that arrive before STOP, whose clock starts with the first; NaN never arrives."""
    order = arrivals.argsort(dim=1, stable=True)  # NaN last
    times = arrivals.gather(1, order)
    place = torch.arange(arrivals.shape[1], device=arrivals.device)
    arrived = (times < torch.logaddexp(times[:, :1], stop)) | ((place == 0) & ~times.isnan())
    return torch.full_like(order, -1).scatter(1, order, torch.where(arrived, place, -1))
