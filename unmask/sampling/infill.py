"""Infilling: rows are grouped by their left padding and decoded without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from unmask.sampling.result import GenerationResult
from unmask.sampling.trajectory import Trajectory, join

Fill = Callable[[Tensor, Tensor], GenerationResult]
"""Fills unpadded rows (n, T) int64; the second argument is their numbers (n,) int64 in the call."""


def fill_by_padding(ids: Tensor, attention: Tensor | None, fill: Fill) -> GenerationResult:
    """Fill the masks of ``ids`` (B, T) in place; rows with equal left padding are decoded together without it.

    So blocks, positions and times count from a row's first token in any batch.
    """
    if attention is None:
        return fill(ids, torch.arange(ids.shape[0], device=ids.device))
    pads = (~attention).sum(dim=1).to(ids.device)
    parts = []
    for pad in pads.unique().tolist():
        rows = (pads == pad).nonzero().flatten()
        if pad < ids.shape[1]:
            parts.append((rows, pad, fill(ids[rows, pad:], rows)))
    return assemble(ids, pads, parts)


def assemble(ids: Tensor, pads: Tensor, parts: list[tuple[Tensor, int, GenerationResult]]) -> GenerationResult:
    """Merge ``parts`` (rows, left padding, result) into one result; ``ids`` (B, T) with left padding ``pads`` (B,) is
    overwritten."""
    count = ids.shape[0]
    out = GenerationResult(
        sequences=ids,
        completions=ids,
        steps=torch.zeros(count, dtype=torch.int64, device=ids.device),
        finished=torch.ones(count, dtype=torch.bool, device=ids.device),
        filled=torch.zeros(count, dtype=torch.int64, device=ids.device),
        forwards=torch.zeros(count, dtype=torch.int64, device=ids.device),
    )
    texts = [""] * count
    origin = replace(parts[0][2].origin, padding=pads) if parts and parts[0][2].origin else None
    trajectories: list[tuple[Tensor, int, Trajectory]] = []
    for rows, pad, part in parts:
        ids[rows, pad:] = part.sequences
        for name in ("steps", "finished", "filled", "forwards"):
            getattr(out, name)[rows] = getattr(part, name)
        if part.texts is not None:
            out.texts = texts
            for row, text in zip(rows.tolist(), part.texts, strict=True):
                texts[row] = text
        if part.trajectory is not None:
            trajectories.append((rows, pad, part.trajectory))
    return replace(out, trajectory=join(trajectories, *ids.shape) if trajectories else None, origin=origin)
