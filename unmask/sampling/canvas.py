"""The canvas that a prompt is completed on: its length and its blocks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import model_attention


def room_for(model: Any, config: SamplerConfig, ids: Tensor, attention: Tensor | None) -> tuple[int, Tensor | None]:
    """The buffer's length behind prompts ``ids`` (B, P), and where each row's last block ends (B,) in the canvas.

    A model that sees whole blocks decodes the last one whole; what lies behind ``max_new_tokens`` is cut later. The
    buffer is as long as any prompt may need, because policies see all of it: rows must not depend on each other's
    prompts. None: rows end with the buffer.
    """
    length, block, start = config.max_new_tokens, config.block_length or 1, ids.shape[1]
    if model_attention(model) == "bidirectional":
        return length, None
    if model_attention(model) != "block-causal":
        room = -(-length // block) * block
        return room, torch.full((len(ids),), start + room)
    real = torch.full((len(ids),), start) if attention is None else attention.sum(1).cpu()
    return length + block - 1, start - real + (real + length + block - 1) // block * block


def blocks_of(
    model: Any, config: SamplerConfig, tokens: Tensor, attention: Tensor | None, start: int
) -> tuple[int, int, Tensor | None]:
    """For a canvas ``tokens`` (N, T) whose buffer begins at ``start``: what :class:`State` needs to know of blocks.

    Returns ``grid``, ``block_length``, and where in a block each row's buffer begins (N,), None for at its start.
    """
    kind, length = model_attention(model), tokens.shape[1] - start
    if kind == "bidirectional":
        return 0, min(config.block_length or length, length), None
    assert config.block_length is not None
    block = config.sub_block_length or config.block_length
    if kind != "block-causal":
        return config.block_length, block, None
    real = torch.full((len(tokens),), start) if attention is None else attention[:, :start].sum(1)
    return config.block_length, block, real.to(tokens.device) % block


def check_blocks(model: Any, config: SamplerConfig) -> None:
    """Raise ValueError for settings that a model whose tokens see no later block cannot have."""
    name = type(model).__name__
    if config.cache in ("prefix", "dual"):
        raise ValueError(
            f'cache="{config.cache}" is for bidirectional models, but {name} is {model.attention}: use cache="exact"'
        )
    if config.block_length is None:
        raise ValueError(f"block_length=None is one block for all, but {name} is {model.attention}; give a number")
    trained = getattr(model, "block_length", None)
    if trained is not None and trained != config.block_length:
        warnings.warn(
            f"block_length={config.block_length}, but the checkpoint was trained on blocks of {trained}", stacklevel=6
        )
    part = config.sub_block_length
    if part is not None and config.block_length % part:
        raise ValueError(f"sub_block_length must divide block_length={config.block_length}, got {part}")
