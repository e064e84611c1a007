"""Choosing positions by a score, for all rows at once. Nothing synchronises with the host; ties go to the left."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROUNDS = 16
"""So many rounds of :func:`independent` take less time than looking whether anything still changes."""


def comparable(score: Tensor, allowed: Tensor) -> Tensor:
    """``score`` (B, L) with -inf where not ``allowed``, and the lowest finite number where it is NaN.

    So :func:`best` finds an allowed position if there is one, and a NaN only when no other is left.
    """
    lowest = torch.finfo(score.dtype).min
    return torch.where(allowed, torch.nan_to_num(score, nan=lowest, posinf=None, neginf=lowest), float("-inf"))


def usable(score: Tensor) -> Tensor:
    """(B, L) bool: allowed and defined, for a score from :func:`comparable`."""
    return score > torch.finfo(score.dtype).min


def best(score: Tensor) -> Tensor:
    """(B, L) bool: the highest score of each row, the lowest position among equals."""
    positions = torch.arange(score.shape[1], device=score.device)
    return positions == score.argmax(dim=1, keepdim=True)


def descending(score: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, L) sorted from the highest, and their positions; equals keep their order."""
    return torch.sort(score, dim=1, descending=True, stable=True)


def unsort(chosen: Tensor, order: Tensor) -> Tensor:
    """Return ``chosen`` (B, L) bool from sorted order to its positions."""
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def top(score: Tensor, count: Tensor) -> Tensor:
    """(B, L) bool: the ``count`` (B,) highest scores of each row."""
    _, order = descending(score)
    positions = torch.arange(score.shape[1], device=score.device)
    return unsort(positions < count[:, None], order)


def longest_prefix(holds: Tensor, order: Tensor) -> Tensor:
    """(B, L) bool: positions, in ``order``, before the first that does not hold."""
    return unsort(holds.to(torch.uint8).cumprod(dim=1).bool(), order)


def independent(chosen: Tensor, score: Tensor, conflict: Tensor, rounds: int) -> Tensor:
    """(B, L) bool: of ``chosen``, from the highest score on, each that has no conflict with one taken before.

    ``conflict`` (1 or B, L, L) bool is symmetric; its diagonal does not count. ``rounds`` bounds how many positions of
    a row are chosen: after n rounds the first n of them are decided. All are run unless they are many and on the CPU,
    so nothing waits for a device.
    """
    score, index = comparable(score, chosen), torch.arange(score.shape[1], device=score.device)
    high, low = score[:, :, None], score[:, None, :]
    ahead = (high > low) | ((high == low) & (index[:, None] < index))
    blocks = (ahead & conflict & chosen[:, :, None]).transpose(1, 2).to(torch.float32)  # (B, L, L): of row by column
    taken = chosen
    for _ in range(rounds):
        before, taken = taken, chosen & ~(torch.bmm(blocks, taken[..., None].float())[..., 0] > 0)
        if rounds > FEW_ROUNDS and chosen.device.type == "cpu" and taken.equal(before):
            break
    return taken
