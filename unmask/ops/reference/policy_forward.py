"""``policy_forward`` in plain torch, straight from the packed weights, by the contract of csrc/ops/policy_forward.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.ops.library import fallback
from unmask.ops.policy_forward import unsupported_sizes
from unmask.ops.reference.checks import check_tensors


@fallback
def policy_forward(
    packed: Tensor,
    hidden: int,
    heads: int,
    ffn: int,
    confidences: int,
    mask: Tensor,
    confidence: Tensor,
    time: Tensor,
    rows: Tensor | None,
    cond: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Arguments and result of the op, computed in ``dtype`` with no shortcut."""
    if problem := unsupported_sizes(hidden, heads, ffn, confidences):
        raise ValueError(problem)
    d = hidden
    shapes = _shapes(d, ffn, confidences)
    counts = [math.prod(shape) for shape in shapes]
    check_tensors(
        {"D": d, "K": confidences, "N": sum(counts)},
        mask,
        mask=(mask, torch.bool, "BL"),
        confidence=(confidence, torch.float32, "BLK"),
        time=(time, torch.float32, "B"),
        rows=(rows, torch.bool, "BL"),
        cond=(cond, torch.float32, "BD"),
        packed=(packed, torch.float32, "N"),
    )
    batch, length = mask.shape
    parts = [part.view(shape) for part, shape in zip(packed.to(dtype).split(counts), shapes, strict=True)]
    frequencies, mask_embedding = parts[:2]
    pairs = zip(parts[2::2], parts[3::2], strict=True)  # weight and bias
    time_in, time_out, confidence_proj, norm1, ada, query, key, value, out, norm2, up, down, norm3, output = pairs

    angles = time.to(dtype)[:, None] * frequencies
    embedded = torch.cat((angles.cos(), angles.sin()), dim=-1)
    shared = F.linear(F.silu(F.linear(embedded, *time_in)), *time_out)  # (B, D)
    if cond is not None:
        shared = shared + cond.to(dtype)
    condition = mask_embedding[mask.long()] + shared[:, None]  # (B, L, D)
    g1, b1, a1, g2, b2, a2 = F.linear(condition, *ada).split(d, dim=-1)

    x = F.linear(confidence.to(dtype), *confidence_proj)
    h = F.layer_norm(x, (d,), *norm1) * (1 + g1) + b1
    q, k, v = (F.linear(h, *w).view(batch, length, heads, d // heads) for w in (query, key, value))
    scores = torch.einsum("bihd,bjhd->bhij", _rotate(q), _rotate(k)) / (d // heads) ** 0.5
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).reshape(batch, length, d)
    x = x + F.linear(mixed, *out) * (1 + a1)
    h = F.gelu(F.linear(F.layer_norm(x, (d,), *norm2) * (1 + g2) + b2, *up))
    x = x + F.linear(h, *down) * (1 + a2)
    logits = F.linear(F.layer_norm(x, (d,), *norm3), *output).squeeze(-1)
    return logits if rows is None else logits.masked_fill(~rows, -math.inf)


def _shapes(d: int, f: int, k: int) -> list[tuple[int, ...]]:
    """Shapes of the packed tensors, in their order: all but the first two are pairs of weight and bias."""
    square, vectors = [(d, d), (d,)], [(d,), (d,)]
    return [
        *[(d // 2,), (2, d)],
        *[*square, *square, (d, k), (d,), *vectors, (6 * d, d), (6 * d,)],
        *[*square * 4, *vectors, (f, d), (f,), (d, f), (d,), *vectors, (1, d), (1,)],
    ]


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding of (B, L, H, d), pairs (2i, 2i+1); base 10000, its frequencies rounded to float32."""
    length, size = x.shape[1], x.shape[3]
    exponents = [-i / size for i in range(0, size, 2)]
    frequencies = torch.tensor([10000.0**e for e in exponents], dtype=torch.float32).to(x)
    angles = torch.arange(length, device=x.device).to(x.dtype)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
