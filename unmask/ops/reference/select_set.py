"""``select_set`` in plain torch, by the contract of csrc/ops/select_set.h, and its network for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.ops.library import fallback
from unmask.ops.policy_forward import unsupported_sizes
from unmask.ops.reference.checks import check, check_tensors, wide_dtype
from unmask.ops.reference.policy_forward import rotary_frequencies, rotate
from unmask.ops.select_set import Proposals

INPUT_TENSORS, LAYER_TENSORS = 8, 12
MOST_LAYERS = 8
NUM_PERIODS = 16
"""Sinusoids that tell a place in the buffer."""
LEAST = 1e-4
"""Probabilities are clamped to [LEAST, 1 - LEAST] before their logit or logarithm is taken."""
UNLIKELY = 1e-6
"""Least probability in a cost, -log p."""


@fallback
def select_set(
    packed: Tensor,
    hidden: int,
    heads: int,
    ffn: int,
    layers: int,
    table: Tensor,
    tokens: Tensor,
    candidates: Tensor,
    mask: Tensor,
    region: Tensor,
    confidence: Tensor,
    probability: Tensor,
    bias: Tensor | None,
    allowed: Tensor,
    risk: Tensor,
    sure: float,
    runs: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result of the op, with no shortcut.

    In float64 unless ``dtype`` says otherwise: rounding to float32 hides that sums depend on the batch's size.
    """
    dtype = dtype or wide_dtype(mask.device)
    check(confidence.ndim == 3, "confidence", "shape (B, L, K)", tuple(confidence.shape))
    confidences = confidence.shape[-1]
    if problem := unsupported_sizes(hidden, heads, ffn, confidences):
        raise ValueError(problem)
    check(1 <= layers <= MOST_LAYERS, "layers", f"1 to {MOST_LAYERS}", layers)
    check(0 < sure < 1, "sure", "a number between 0 and 1", sure)
    check(runs >= 1, "runs", "at least 1", runs)
    shapes = _shapes(hidden, ffn, confidences, layers)
    counts = [math.prod(shape) for shape in shapes]
    check_tensors(
        {"D": hidden, "K": confidences, "P": sum(counts)},
        mask,
        mask=(mask, torch.bool, "BL"),
        tokens=(tokens, torch.int64, "BL"),
        candidates=(candidates, torch.int64, "BL"),
        region=(region, torch.bool, "BL"),
        confidence=(confidence, torch.float32, "BLK"),
        probability=(probability, torch.float32, "BL"),
        bias=(bias, torch.float32, "BL"),
        allowed=(allowed, torch.bool, "BL"),
        risk=(risk, torch.float32, "B"),
        table=(table, torch.float32, "ND"),
        packed=(packed, torch.float32, "P"),
    )
    check(len(table) >= 1, "table", "at least one row", tuple(table.shape))
    if not mask.numel():
        return torch.zeros_like(mask), torch.zeros_like(probability)
    parts = packed.to(dtype).split(counts)
    weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    proposals = Proposals(tokens, candidates, mask, region, confidence, probability, bias)
    frequencies = rotary_frequencies(hidden // heads).to(weights[0])
    rest = (proposals, allowed, risk.to(dtype), sure, runs)
    turn, score = selected(weights, frequencies, table.to(dtype), *rest)
    return turn > 0, score.float()


def selected(
    weights: Sequence[Tensor],
    frequencies: Tensor,
    table: Tensor,
    proposals: Proposals,
    allowed: Tensor,
    risk: Tensor,
    sure: float,
    runs: int,
) -> tuple[Tensor, Tensor]:
    """For a network of any size, in the dtype of ``weights``; these two as for :func:`set_logits`.

    Returns (B, L) int64, 0 where nothing is selected, else which run of the network selected it, from 1 on, and the
    op's score.
    """
    read = read_proposals(proposals)
    numbers = [t.to(weights[0].dtype) for t in read[1:]]
    x = set_inputs(weights, table[read[0].clamp_max(len(table) - 1)], proposals.mask, *numbers)
    prior, change = prior_logit(numbers[1]), weights[1][2] - weights[1][1]
    if proposals.bias is not None:
        prior = prior + proposals.bias
    batch = torch.arange(len(x), device=x.device)
    turn, spent = torch.zeros_like(allowed, dtype=torch.int64), torch.zeros_like(risk)
    level = torch.exp(-risk).clamp_min(sure)[:, None]
    rows, score = batch, torch.zeros_like(prior)
    for run in range(runs):
        chosen = turn[rows] > 0
        free = allowed[rows] & ~chosen
        marked = x[rows] + chosen[..., None] * change
        p = (prior[rows] + set_logits(marked, weights, frequencies)).sigmoid()
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
        turn[rows] += (run + 1) * new
        spent[rows] += torch.where(takes, cost, 0.0)[:, 0]
        if x.device.type == "cpu":  # on other devices all rows run on, as asking which have ended would wait
            rows = rows[new.any(dim=1) & (free & ~new).any(dim=1)]
            if not len(rows):
                break
    return turn, score


def read_proposals(proposals: Proposals) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L) int64, confidences (B, L, k) and probabilities (B, L) as the network reads them."""
    p, region = proposals, proposals.region
    tokens = torch.where(region, p.candidates, p.tokens).clamp_min(0)
    confidence = torch.where(region[..., None], p.confidence.nan_to_num(0.0), 0.0)
    return tokens, confidence, torch.where(region, p.probability.nan_to_num(0.0), 0.0)


def prior_logit(probability: Tensor) -> Tensor:
    """Logit of the proposal's probability, to which a network's output is added; a minus sign and NaN count nothing."""
    return torch.logit(probability.abs().nan_to_num(0.0).clamp(LEAST, 1 - LEAST))


def rule_logit(probability: Tensor, level: float) -> Tensor:
    """What the rule threshold:level says of proposals of this probability, as a logit that is 0 at the level."""
    return prior_logit(probability) - math.log(level / (1 - level))


def num_numbers(confidences: int) -> int:
    """Columns of the matrix for what the network reads of a position beside its token; the last count nothing."""
    return -(-(confidences + 2 + 2 * NUM_PERIODS) // 16) * 16


def set_inputs(
    weights: Sequence[Tensor], tokens: Tensor, mask: Tensor, confidence: Tensor, probability: Tensor
) -> Tensor:
    """(B, L, D): the network's inputs where nothing is picked; ``tokens`` (B, L, D) are rows of the table."""
    frequencies, state, numbers, bias, share_in, share_in_bias, share_out, share_out_bias = weights[:INPUT_TENSORS]
    angles = torch.arange(mask.shape[1], device=mask.device, dtype=frequencies.dtype)[:, None] * frequencies
    place = torch.cat((angles.cos(), angles.sin()), dim=-1).expand(len(mask), -1, -1)
    p = probability[..., None]
    read = torch.cat((confidence, p, p.clamp_min(LEAST).log(), place), dim=-1)
    x = F.linear(read, numbers[:, : read.shape[-1]], bias)
    committed = 1 - mask.to(p.dtype).mean(dim=1, keepdim=True)
    share = F.linear(F.silu(F.linear(4 * committed, share_in, share_in_bias)), share_out, share_out_bias)
    return x + F.embedding(mask.long(), state) + share[:, None] + tokens


def set_logits(x: Tensor, weights: Sequence[Tensor], frequencies: Tensor) -> Tensor:
    """The network's output (B, L) for its inputs ``x`` (B, L, D): pre-norm layers of full attention with rotary places.

    It is differentiable. ``weights`` are in the op's order, ``frequencies`` (head size / 2,) the rotary ones.
    """
    batch, length, width = x.shape
    head = 2 * len(frequencies)
    *layers, norm, norm_bias, output, output_bias = weights[INPUT_TENSORS:]
    angles = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * frequencies
    for i in range(0, len(layers), LAYER_TENSORS):
        n1, n1_bias, qkv, qkv_bias, out, out_bias, n2, n2_bias, up, up_bias, down, down_bias = layers[
            i : i + LAYER_TENSORS
        ]
        h = F.linear(F.layer_norm(x, (width,), n1, n1_bias), qkv, qkv_bias)
        q, k, v = h.view(batch, length, 3, -1, head).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), out, out_bias)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), n2, n2_bias), up, up_bias)), down, down_bias)
    return F.linear(F.layer_norm(x, (width,), norm, norm_bias), output, output_bias)[..., 0]


def _shapes(d: int, f: int, k: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the packed tensors, in their order: all but the first two are pairs of weight and bias."""
    norm, square = [(d,), (d,)], [(d, d), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), *square, *norm, (f, d), (f,), (d, f), (d,)]
    inputs = [(NUM_PERIODS,), (3, d), (d, num_numbers(k)), (d,), (d, 1), (d,), *square]
    return [*inputs, *layer * layers, *norm, (1, d), (1,)]
