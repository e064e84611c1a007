"""Plain torch version of :func:`unmask.ops.policy_forward`, in any floating dtype, straight from the packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops.types import PolicyWeights


def policy_forward(
    weights: PolicyWeights,
    mask: Tensor,
    confidence: Tensor,
    time: Tensor,
    rows: Tensor | None = None,
    cond: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Same arguments and result as the op, computed position by position with no shortcut, in ``dtype``."""
    d, f, k, heads = weights.hidden, weights.ffn, weights.confidences, weights.heads
    take = _Reader(weights.packed.to(dtype))
    frequencies, mask_embedding = take(d // 2), take(2, d)
    time_in, time_out = _linear(take, d, d), _linear(take, d, d)
    confidence_proj, norm1, ada = _linear(take, d, k), _vectors(take, d), _linear(take, 6 * d, d)
    query, key, value, out = (_linear(take, d, d) for _ in range(4))
    norm2, up, down = _vectors(take, d), _linear(take, f, d), _linear(take, d, f)
    final_norm, output = _vectors(take, d), _linear(take, 1, d)
    if take(-1).numel():
        raise ValueError(f"{weights.packed.numel()} packed weights are too many for these sizes")

    batch, length = mask.shape
    angles = time.to(dtype)[:, None] * frequencies
    embedded = torch.cat((angles.cos(), angles.sin()), dim=-1)
    hidden = _affine(embedded, time_in)
    shared = _affine(hidden * torch.sigmoid(hidden), time_out)  # (B, D)
    if cond is not None:
        shared = shared + cond.to(dtype)
    condition = mask_embedding[mask.long()] + shared[:, None]  # (B, L, D)
    g1, b1, a1, g2, b2, a2 = _affine(condition, ada).split(d, dim=-1)

    x = _affine(confidence.to(dtype), confidence_proj)
    h = _norm(x, norm1) * (1 + g1) + b1
    q, k_, v = (_affine(h, w).view(batch, length, heads, d // heads) for w in (query, key, value))
    scores = torch.einsum("bihd,bjhd->bhij", _rotate(q), _rotate(k_)) / (d // heads) ** 0.5
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).reshape(batch, length, d)
    x = x + _affine(mixed, out) * (1 + a1)
    h = _affine(_norm(x, norm2) * (1 + g2) + b2, up)
    gelu = 0.5 * h * (1 + torch.erf(h * 0.5**0.5))
    x = x + _affine(gelu, down) * (1 + a2)
    logits = _affine(_norm(x, final_norm), output).squeeze(-1)
    return logits if rows is None else logits.masked_fill(~rows, float("-inf"))


class _Reader:
    """Hands out the packed weights front to back; ``take(-1)`` is what is left."""

    def __init__(self, packed: Tensor) -> None:
        self.packed, self.offset = packed, 0

    def __call__(self, *shape: int) -> Tensor:
        if shape == (-1,):
            return self.packed[self.offset :]
        count = torch.Size(shape).numel()
        part = self.packed[self.offset : self.offset + count]
        self.offset += count
        return part.view(shape)


def _linear(take: _Reader, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return take(rows, columns), take(rows)


def _vectors(take: _Reader, size: int) -> tuple[Tensor, Tensor]:
    return take(size), take(size)


def _affine(x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
    return x @ layer[0].T + layer[1]


def _norm(x: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * affine[0] + affine[1]


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding of (B, L, H, d), pairs (2i, 2i+1); base 10000, its frequencies rounded to float32."""
    length, size = x.shape[1], x.shape[3]
    exponent = torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size
    frequencies = (10000.0**-exponent).float().to(x.dtype)
    angles = torch.arange(length, dtype=x.dtype, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
