"""Building a set of positions within one step, by a small network that runs again with what is picked marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LAYER_TENSORS = 12
UNLIKELY = 1e-6
"""Least probability in a cost, -log p."""


def set_logits(x: Tensor, weights: Sequence[Tensor], heads: int, frequencies: Tensor) -> Tensor:
    """The network's output (B, L) for its inputs ``x`` (B, L, D): pre-norm layers of full attention with rotary places.

    ``weights`` are weight and bias of norm, query-key-value, output, norm, up and down projection for each layer, then
    of the last norm and the output (1, D). ``frequencies`` (D / heads / 2,) are those of the rotary embedding.
    """
    batch, length, width = x.shape
    angles = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def turned(part: Tensor) -> Tensor:
        left, right = part.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    *layers, norm, norm_bias, output, output_bias = weights
    for i in range(0, len(layers), LAYER_TENSORS):
        n1, n1_bias, qkv, qkv_bias, out, out_bias, n2, n2_bias, up, up_bias, down, down_bias = layers[
            i : i + LAYER_TENSORS
        ]
        h = F.linear(F.layer_norm(x, (width,), n1, n1_bias), qkv, qkv_bias)
        q, k, v = h.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), out, out_bias)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), n2, n2_bias), up, up_bias)), down, down_bias)
    return F.linear(F.layer_norm(x, (width,), norm, norm_bias), output, output_bias)[..., 0]


def select_set(
    x: Tensor,
    change: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    frequencies: Tensor,
    prior: Tensor,
    allowed: Tensor,
    risk: Tensor,
    sure: float,
    runs: int,
) -> tuple[Tensor, Tensor]:
    """The positions to commit in one step, each row by itself.

    In each of at most ``runs`` runs p = sigmoid(prior + network) of every allowed position, given those picked so far.
    All with p above ``sure``, or above exp(-risk) where that is more, are picked. Then the most probable of the others
    is, if -log p summed over such picks stays within ``risk``; the very first pick of a row costs nothing, so that at
    least one is made. A row in which a run picks nothing has ended.

    Args:
        x: (B, L, D) float32, the network's inputs where nothing is picked.
        change: (D,) float32, added to the inputs of a picked position.
        weights, heads, frequencies: of the network, as :func:`set_logits` takes them.
        prior: (B, L) float32 logits, to which the network's output is added.
        allowed: (B, L) bool.
        risk: (B,) float32, at least 0.

    Returns:
        (B, L) bool, the positions picked, and (B, L) float32, p of the first run, 0 where not ``allowed``.
    """
    batch = torch.arange(len(x), device=x.device)
    picked, spent = torch.zeros_like(allowed), torch.zeros_like(risk)
    level = torch.exp(-risk).clamp_min(sure)[:, None]
    rows, score = batch, torch.zeros_like(prior)
    for run in range(runs):
        chosen, free = picked[rows], allowed[rows] & ~picked[rows]
        marked = x[rows] + chosen[..., None] * change
        p = (prior[rows] + set_logits(marked, weights, heads, frequencies)).sigmoid()
        p = torch.where(free, p.nan_to_num(0.0), -1.0)
        if run == 0:
            score = p.clamp_min(0.0)
        certain = p > level[rows]
        best, place = p.masked_fill(certain, -1.0).max(dim=1, keepdim=True)
        cost = -best.clamp_min(UNLIKELY).log()
        first = ~(chosen | certain).any(dim=1, keepdim=True)
        cost = torch.where(first, 0.0, cost)
        takes = (best >= 0) & (first | (spent[rows][:, None] + cost <= risk[rows][:, None]))
        new = certain | torch.zeros_like(certain).scatter(1, place, takes)
        picked[rows] = chosen | new
        spent[rows] += torch.where(takes, cost, 0.0)[:, 0]
        if x.device.type == "cpu":  # on other devices all rows run on, as asking which have ended would wait
            rows = rows[new.any(dim=1) & (free & ~new).any(dim=1)]
            if not len(rows):
                break
    return picked, score
