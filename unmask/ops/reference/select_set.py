"""Building a set of positions within one step, by a small network that runs again with what is picked marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.ops.library import fallback
from unmask.ops.policy_forward import unsupported_sizes
from unmask.ops.reference.checks import check, check_tensors
from unmask.ops.reference.policy_forward import rotary_frequencies, rotate

LAYER_TENSORS = 12
MOST_LAYERS = 8
UNLIKELY = 1e-6
"""Least probability in a cost, -log p."""


def set_logits(x: Tensor, weights: Sequence[Tensor], heads: int, frequencies: Tensor) -> Tensor:
    """The network's output (B, L) for its inputs ``x`` (B, L, D): pre-norm layers of full attention with rotary places.

    ``weights`` are weight and bias of norm, query-key-value, output, norm, up and down projection for each layer, then
    of the last norm and the output (1, D). Channels 2i and 2i + 1 of a query or key are a rotary pair. ``frequencies``
    (D / heads / 2,) are those of the rotary embedding.
    """
    batch, length, width = x.shape
    angles = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * frequencies
    *layers, norm, norm_bias, output, output_bias = weights
    for i in range(0, len(layers), LAYER_TENSORS):
        n1, n1_bias, qkv, qkv_bias, out, out_bias, n2, n2_bias, up, up_bias, down, down_bias = layers[
            i : i + LAYER_TENSORS
        ]
        h = F.linear(F.layer_norm(x, (width,), n1, n1_bias), qkv, qkv_bias)
        q, k, v = h.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), out, out_bias)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), n2, n2_bias), up, up_bias)), down, down_bias)
    return F.linear(F.layer_norm(x, (width,), norm, norm_bias), output, output_bias)[..., 0]


@fallback
def select_set(
    packed: Tensor,
    hidden: int,
    heads: int,
    ffn: int,
    layers: int,
    x: Tensor,
    prior: Tensor,
    allowed: Tensor,
    risk: Tensor,
    sure: float,
    runs: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Arguments and result of the op, computed in ``dtype`` with no shortcut."""
    if problem := unsupported_sizes(hidden, heads, ffn, 1):
        raise ValueError(problem)
    check(1 <= layers <= MOST_LAYERS, "layers", f"1 to {MOST_LAYERS}", layers)
    check(0 < sure < 1, "sure", "a number between 0 and 1", sure)
    check(runs >= 1, "runs", "at least 1", runs)
    shapes = _shapes(hidden, ffn, layers)
    counts = [math.prod(shape) for shape in shapes]
    check_tensors(
        {"D": hidden, "N": sum(counts)},
        x,
        allowed=(allowed, torch.bool, "BL"),
        x=(x, torch.float32, "BLD"),
        prior=(prior, torch.float32, "BL"),
        risk=(risk, torch.float32, "B"),
        packed=(packed, torch.float32, "N"),
    )
    parts = packed.to(dtype).split(counts)
    if not allowed.numel():
        return allowed.clone(), prior.clone()
    change, *weights = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    frequencies = rotary_frequencies(hidden // heads).to(change)
    network = (weights, heads, frequencies)
    select, score = selected(x.to(dtype), change, network, prior.to(dtype), allowed, risk.to(dtype), sure, runs)
    return select, score.float()


def selected(
    x: Tensor,
    change: Tensor,
    network: tuple[Sequence[Tensor], int, Tensor],
    prior: Tensor,
    allowed: Tensor,
    risk: Tensor,
    sure: float,
    runs: int,
) -> tuple[Tensor, Tensor]:
    """Result of the op for a network of any size, in the dtype of ``x``.

    ``change`` (D,) is added to the inputs of a picked position; ``network`` are the last three arguments of
    :func:`set_logits`. For the others see :func:`unmask.ops.select_set`.
    """
    batch = torch.arange(len(x), device=x.device)
    picked, spent = torch.zeros_like(allowed), torch.zeros_like(risk)
    level = torch.exp(-risk).clamp_min(sure)[:, None]
    rows, score = batch, torch.zeros_like(prior)
    for run in range(runs):
        chosen, free = picked[rows], allowed[rows] & ~picked[rows]
        marked = x[rows] + chosen[..., None] * change
        p = (prior[rows] + set_logits(marked, *network)).sigmoid()
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


def _shapes(d: int, f: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the packed tensors, in their order: all but the first are pairs of weight and bias."""
    norm = [(d,), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (f, d), (f,), (d, f), (d,)]
    return [(d,), *layer * layers, *norm, (1, d), (1,)]
