"""``unmask_`` in plain torch, by the contract of csrc/ops/unmask.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.random import ACTION_INDEX, STOP_INDEX, philox_uniform
from unmask.ops.reference.checks import check, check_seed, check_tensors, wide_dtype
from unmask.ops.state import COMPLETE, EXHAUSTED, POISONED, RUNNING

SELECT, BERNOULLI, BERNOULLI_ARGMAX, GREEDY, DPLS = range(5)
_DRAWING = (BERNOULLI, BERNOULLI_ARGMAX, DPLS)


@fallback
def unmask_(
    tokens: Tensor,
    mask: Tensor,
    allowed: Tensor,
    rows: Tensor,
    candidates: Tensor,
    action: Tensor,
    start: int,
    block_length: int,
    max_steps: int,
    action_mode: int,
    eos: Sequence[int],
    temperature: float,
    scale: float,
    stop_logit: float,
    seed: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Arguments, effects and result of the op; probabilities and times are in ``dtype``, the widest unless given."""
    dtype = dtype or wide_dtype(tokens.device)
    decided = action_mode == SELECT and action.dtype == torch.bool
    _check_tensors(tokens, mask, allowed, rows, candidates, action, torch.bool if decided else torch.float32)
    check_seed(seed, action_mode in _DRAWING, tokens)
    length = mask.shape[1]
    _check_numbers(tokens.shape[1] - length, start, block_length, max_steps, eos, temperature, scale, stop_logit)

    steps, remaining, block, status, sequence, draw_step, position, phase = rows.unbind(1)
    index = torch.arange(length, device=tokens.device)
    blocks = (index + phase[:, None]) // block_length  # (B, L)
    num_blocks = (length + phase + block_length - 1) // block_length
    running = status == RUNNING
    may = allowed & mask & (blocks == _first_block(mask, blocks, num_blocks)[:, None]) & running[:, None]

    def draws(kind: int, at: Tensor) -> Tensor:
        assert seed is not None
        where = (at + position[:, None], (steps + draw_step)[:, None], sequence[:, None])
        return philox_uniform(seed, *where, kind).to(dtype)

    utilities = action.to(dtype) / (temperature if action_mode in _DRAWING else 1.0)
    rank = _rank(utilities, may, action_mode, scale, stop_logit, draws)
    poisoned = ((rank >= 0) & (candidates < 0)).any(1)
    rank = rank.masked_fill(poisoned[:, None], -1)
    running &= ~poisoned
    left = mask & (rank < 0)
    buffer = tokens[:, start : start + length]
    buffer.copy_(torch.where(rank >= 0, candidates, buffer))
    stops = torch.zeros_like(mask)
    for stop in eos:
        stops |= buffer == stop
    stops &= (left.cumsum(1) == 0) & running[:, None]
    ended = stops.any(1, keepdim=True)
    buffer.copy_(torch.where(left & ended, buffer.gather(1, _first(stops)[:, None]), buffer))
    left &= ~ended

    steps += running
    ending = torch.where(left.any(1), torch.where(steps >= max_steps, EXHAUSTED, RUNNING), COMPLETE)
    status.copy_(torch.where(poisoned, POISONED, torch.where(running, ending, status)))
    remaining.copy_(torch.where(running, left.sum(1), remaining))
    first = _first_block(left, blocks, num_blocks)
    block.copy_(torch.where(running, first, block))
    mask &= left | ~running[:, None]
    may = left & (blocks == first[:, None]) & (status == RUNNING)[:, None]
    allowed.copy_(torch.where((running | poisoned)[:, None], may, allowed))
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


def _check_tensors(
    tokens: Tensor, mask: Tensor, allowed: Tensor, rows: Tensor, candidates: Tensor, action: Tensor, kind: torch.dtype
) -> None:
    check(mask.ndim == 2 and mask.shape[1] >= 1, "mask", "shape (B, L) with L >= 1", tuple(mask.shape))
    check_tensors(
        {"8": 8},
        tokens,
        tokens=(tokens, torch.int64, "BT"),
        mask=(mask, torch.bool, "BL"),
        allowed=(allowed, torch.bool, "BL"),
        rows=(rows, torch.int64, "B8"),
        candidates=(candidates, torch.int64, "BL"),
        action=(action, kind, "BL"),
    )
    for name, tensor in (("mask", mask), ("allowed", allowed), ("rows", rows)):
        check(tensor.is_contiguous(), name, "a contiguous tensor, as it is written in place", tensor.stride())
    (batch, width), stride = tokens.shape, tokens.stride()
    apart = (width <= 1 or stride[1] == 1) and (batch <= 1 or abs(stride[0]) >= width)
    check(apart, "tokens", "contiguous rows that do not overlap, as they are written in place", stride)


def _check_numbers(
    room: int,
    start: int,
    block_length: int,
    max_steps: int,
    eos: Sequence[int],
    temperature: float,
    scale: float,
    stop_logit: float,
) -> None:
    check(0 <= start <= room, "start", f"0 to {room}", start)
    check(block_length >= 1, "block_length", "at least 1", block_length)
    check(max_steps >= 1, "max_steps", "at least 1", max_steps)
    check(len(eos) <= 16, "eos", "at most 16 ids", len(eos))
    check(min(eos, default=0) >= 0, "eos", "ids of at least 0", min(eos, default=0))
    check(0 < temperature <= 1e30, "temperature", "a number above 0 and up to 1e30", temperature)
    check(0 <= scale <= 1e30, "scale", "a number from 0 to 1e30", scale)
    check(abs(stop_logit) <= 1e30, "stop_logit", "a number from -1e30 to 1e30", stop_logit)
