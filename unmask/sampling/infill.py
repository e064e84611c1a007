"""Filling holes: rows without a common start, each decoded as it would be without its padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.sampling.canvas import Canvas
from unmask.sampling.config import SamplerConfig
from unmask.sampling.prompts import check_ids, check_tensor_prompts
from unmask.sampling.result import GenerationResult
from unmask.sampling.trajectory import Trajectory, join

if TYPE_CHECKING:
    from unmask.sampling.sampler import Sampler


def infill_config(config: SamplerConfig, overrides: Mapping[str, Any]) -> SamplerConfig:
    """``config`` for holes, with ``overrides``: an end of sequence stops nothing, and no buffer has to be divided."""
    if "max_new_tokens" in overrides:
        raise ValueError("max_new_tokens does not apply to infill, which fills the holes of input_ids")
    length = overrides.get("block_length", config.block_length) or config.max_new_tokens
    return config.updated({**overrides, "max_new_tokens": length, "stop_at_eos": False})


def infill(
    sampler: Sampler, input_ids: Tensor, attention_mask: Tensor | None, config: SamplerConfig
) -> GenerationResult:
    """Fill the masks of ``input_ids`` (B, T); rows with equal left padding are decoded together, without it.

    So blocks, positions and times count from a row's first token, whatever stands beside it.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be an int64 tensor of shape (B, T), got {type(input_ids).__name__}")
    ids, attention = check_tensor_prompts(input_ids, attention_mask, sampler.padding_id, "input_ids")
    check_ids("input_ids", ids, attention, sampler.model.vocab_size, None)
    width = ids.shape[1]
    if width == 0:
        raise ValueError(f"input_ids must have at least one token, got shape {tuple(ids.shape)}")
    sampler.check_context(width, f"input_ids of {width} tokens")
    ids = ids.to(sampler.model.device, copy=True)
    if attention is None:
        return fill(sampler, ids, torch.arange(ids.shape[0], device=ids.device), config)
    pads = (~attention).sum(dim=1).to(ids.device)
    parts = []
    for pad in pads.unique().tolist():
        rows = (pads == pad).nonzero().flatten()
        if pad < width:
            parts.append((rows, pad, fill(sampler, ids[rows, pad:], rows, config)))
    return assemble(ids, parts)


def fill(sampler: Sampler, ids: Tensor, sequence: Tensor, config: SamplerConfig) -> GenerationResult:
    """Fill unpadded rows ``ids`` (n, T), whose draws are keyed by ``sequence`` (n,) int64."""
    block_length = min(config.block_length or ids.shape[1], ids.shape[1])
    canvas = Canvas.create(ids, None, 0, sampler.model.mask_token_id, block_length)
    canvas.sequence = sequence
    return sampler.finish(sampler.with_alpha(canvas, config), config, None)


def assemble(ids: Tensor, parts: list[tuple[Tensor, int, GenerationResult]]) -> GenerationResult:
    """The results of ``parts`` (their rows, left padding, what came out) as one; ``ids`` (B, T) is overwritten."""
    count = ids.shape[0]
    out = GenerationResult(
        sequences=ids,
        completions=ids,
        steps=torch.zeros(count, dtype=torch.int64, device=ids.device),
        finished=torch.ones(count, dtype=torch.bool, device=ids.device),
        filled=torch.zeros(count, dtype=torch.int64, device=ids.device),
    )
    texts = [""] * count
    trajectories: list[tuple[Tensor, int, Trajectory]] = []
    for rows, pad, part in parts:
        ids[rows, pad:] = part.sequences
        out.steps[rows], out.finished[rows], out.filled[rows] = part.steps, part.finished, part.filled
        if part.texts is not None:
            out.texts = texts
            for row, text in zip(rows.tolist(), part.texts, strict=True):
                texts[row] = text
        if part.trajectory is not None:
            trajectories.append((rows, pad, part.trajectory))
    return replace(out, trajectory=join(trajectories, *ids.shape) if trajectories else None)
