"""``policy_forward`` in plain torch, by the contract of csrc/ops/policy_forward.h, and its network for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.ops.library import fallback
from unmask.ops.policy_forward import unsupported_sizes
from unmask.ops.reference.checks import check_tensors, wide_dtype


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Arguments and result of the op, with no shortcut.

    In float64 unless ``dtype`` says otherwise: rounding to float32 hides that sums depend on the batch's size.
    """
    wide = dtype or wide_dtype(mask.device)
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
    tensors = [part.view(shape) for part, shape in zip(packed.to(wide).split(counts), shapes, strict=True)]
    rotary, added = rotary_frequencies(d // heads).to(tensors[0]), None if cond is None else cond.to(wide)
    logits = network(tensors, heads, mask, confidence.to(wide), time.to(wide), rotary, added).to(dtype or torch.float32)
    return logits if rows is None else logits.masked_fill(~rows, -math.inf)


def network(
    tensors: Sequence[Tensor],
    heads: int,
    mask: Tensor,
    confidence: Tensor,
    time: Tensor,
    rotary: Tensor,
    added: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Logits (B, L) of the network of ``tensors``, which are in the op's order; differentiable, in their dtype.

    ``rotary`` (D / heads / 2,) are the :func:`rotary_frequencies`. ``added`` (B, D) is added to the conditioning.
    ``valid`` (B, L) bool are the keys to attend to, None: all.
    """
    frequencies, mask_embedding, *layers = tensors
    pairs = zip(layers[::2], layers[1::2], strict=True)  # weight and bias
    time_in, time_out, confidence_proj, norm1, ada, query, key, value, out, norm2, up, down, norm3, output = pairs
    batch, length, d = *mask.shape, mask_embedding.shape[1]
    shared = F.linear(F.silu(F.linear(sinusoidal_embedding(time, frequencies), *time_in)), *time_out)  # (B, D)
    if added is not None:
        shared = shared + added
    # A sequence has only two conditioning vectors, so the projection runs on those and not on L positions.
    both = F.linear(shared[:, None] + mask_embedding, *ada)  # (B, 2, 6 D)
    g1, b1, a1, g2, b2, a2 = torch.where(mask[..., None], both[:, 1:], both[:, :1]).chunk(6, dim=-1)

    x = F.linear(confidence, *confidence_proj)
    h = F.layer_norm(x, (d,), *norm1) * (1 + g1) + b1
    split = (batch, length, heads, d // heads)
    q, k, v = (F.linear(h, *layer).view(split).transpose(1, 2) for layer in (query, key, value))
    angles = torch.arange(length, device=x.device, dtype=rotary.dtype)[:, None] * rotary
    keys = None if valid is None else valid[:, None, None, :]
    mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, attn_mask=keys)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, d), *out) * (1 + a1)
    h = F.layer_norm(x, (d,), *norm2) * (1 + g2) + b2
    x = x + F.linear(F.gelu(F.linear(h, *up)), *down) * (1 + a2)
    return F.linear(F.layer_norm(x, (d,), *norm3), *output).squeeze(-1)


def sinusoidal_embedding(value: Tensor, frequencies: Tensor) -> Tensor:
    """``[cos(v f), sin(v f)]``: (B,) and (D/2,) -> (B, D)."""
    angles = value[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_frequencies(head_dim: int) -> Tensor:
    """(head_dim / 2,) float32: ``10000 ** (-2i / head_dim)``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (10_000.0**-exponent).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of ``x`` (B, H, L, d) by ``angles`` (L, d/2); the halves end up [even', odd']."""
    (even, odd), cos, sin = (x[..., 0::2], x[..., 1::2]), angles.cos(), angles.sin()
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


def _shapes(d: int, f: int, k: int) -> list[tuple[int, ...]]:
    """Shapes of the packed tensors, in their order: all but the first two are pairs of weight and bias."""
    square, vectors = [(d, d), (d,)], [(d,), (d,)]
    return [
        *[(d // 2,), (2, d)],
        *[*square, *square, (d, k), (d,), *vectors, (6 * d, d), (6 * d,)],
        *[*square * 4, *vectors, (f, d), (f,), (d, f), (d,), *vectors, (1, d), (1,)],
    ]
