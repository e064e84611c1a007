"""Rotary position embeddings: partial, with YaRN, and with the growing query scale of Llama 4."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unmask.config import Config, NonNegative, Positive, PositiveInt
from unmask.models.base import real_positions

CACHED_ANGLES = 4096
"""Rotary tables are kept for this many positions (4 MB at head_dim 128) and computed anew for longer canvases."""

Tables = tuple[Tensor, ...]
"""Cosines and signed sines (..., 1, width) and, if queries are scaled, their scale (..., 1, 1); all float32."""


class Yarn(Config, kw_only=True):
    """YaRN (Peng et al., arXiv 2309.00071) under transformers' names: slow frequencies are divided by ``factor``.

    ``llama_4_scaling_beta`` also multiplies the query at position p by
    1 + beta * ln(1 + floor(p / original_max_position_embeddings)).
    """

    factor: Positive
    original_max_position_embeddings: PositiveInt
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    attention_factor: Positive | None = None
    truncate: bool = True
    llama_4_scaling_beta: NonNegative | None = None

    @property
    def table_scale(self) -> float:
        """What cosines and sines are multiplied by: ``attention_factor``, or as the two ``mscale`` say."""
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """The ``plain`` frequencies (width / 2,) where they turn often within the original context, else divided."""
        width = 2 * plain.shape[0]

        def channel(turns: float) -> float:  # the one that turns so often within the original context
            return (
                width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
            )

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = high - low or 0.001  # transformers' way around a division by zero
        slow = ((torch.arange(width // 2, device=plain.device, dtype=plain.dtype) - low) / span).clamp(0, 1)
        return plain / self.factor * slow + plain * (1 - slow)


def rotary_tables(positions: Tensor, width: int, theta: float, yarn: Yarn | None = None) -> Tables:
    """Tables for ``positions`` of any shape over the first ``width`` channels, half-split pairing as in Llama.

    The first half of the sines is negated, so that a rotation is ``x * cos + roll(x, width / 2) * sin``.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    if yarn is not None:
        frequencies = yarn.frequencies(frequencies, theta)
    angles = positions[..., None, None].float() * frequencies  # (..., 1, width / 2)
    cos, sin = angles.cos(), angles.sin()
    tables = (torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))
    if yarn is None:
        return tables
    tables = (tables[0] * yarn.table_scale, tables[1] * yarn.table_scale)
    if not yarn.llama_4_scaling_beta:
        return tables
    periods = positions.div(yarn.original_max_position_embeddings, rounding_mode="floor").float()
    return *tables, (1 + yarn.llama_4_scaling_beta * periods.log1p())[..., None, None]


def apply_rotary(x: Tensor, tables: Tables, query: bool = False) -> Tensor:
    """Rotate the first channels of ``x`` (B, T, H, D), and scale a query, in float32 at least; returns x's dtype."""
    cos, sin = tables[:2]
    width = cos.shape[-1]
    turned = x[..., :width]
    rotated = (turned * cos).addcmul_(turned.roll(width // 2, dims=-1), sin)
    if width < x.shape[-1]:
        rotated = torch.cat((rotated, x[..., width:]), dim=-1)
    if query and len(tables) == 3:
        rotated = rotated * tables[2]
    return rotated.to(x.dtype)


class Rotary(nn.Module):
    """Rotary tables for the positions of a canvas, computed once per device and always float32."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor

    def __init__(self, width: int, theta: float, max_length: int, yarn: Yarn | None = None) -> None:
        super().__init__()
        self.width, self.theta, self.length, self.yarn = width, theta, min(max_length, CACHED_ANGLES), yarn
        scaled = yarn is not None and yarn.llama_4_scaling_beta
        self.names = ("cos", "sin", "query_scale") if scaled else ("cos", "sin")
        for name in self.names:
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._fill(self.cos.device)

    def _fill(self, device: torch.device) -> None:
        tables = rotary_tables(torch.arange(self.length, device=device), self.width, self.theta, self.yarn)
        for name, table in zip(self.names, tables, strict=True):
            setattr(self, name, table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # The tables follow .to(device) and .to_empty(), but .to(dtype) must not round them.
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self

    def forward(self, length: int, attention_mask: Tensor | None) -> Tables:
        """Tables (T, 1, ...) of an unpadded canvas, (B, T, 1, ...) of one padded as ``attention_mask`` (B, T) says."""
        if attention_mask is not None:
            return self.at(real_positions(attention_mask), length)
        if length <= self.length:
            return tuple(getattr(self, name)[:length] for name in self.names)
        return self.at(torch.arange(length, device=self.cos.device), length)

    def at(self, positions: Tensor, length: int) -> Tables:
        """Tables (..., 1, width) of ``positions`` (...) int64, all below ``length``."""
        if length <= self.length:
            return tuple(getattr(self, name)[positions] for name in self.names)
        return rotary_tables(positions, self.width, self.theta, self.yarn)
