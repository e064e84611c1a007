"""``policy_forward``: the whole policy network in one call, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops import library  # noqa: F401  (registers the op)
from unmask.ops.types import PolicyWeights

MAX_HIDDEN = 256
MAX_FFN = 1024
MAX_CONFIDENCES = 64


def unsupported_sizes(hidden: int, heads: int, ffn: int, confidences: int) -> str | None:
    """Why the op cannot take a network of these sizes, or None if it can."""
    if not 16 <= hidden <= MAX_HIDDEN or hidden % 16:
        return f"hidden: expected a multiple of 16 up to {MAX_HIDDEN}, got {hidden}"
    if heads < 1 or hidden % heads or (hidden // heads) % 2:
        return f"heads: expected hidden / heads to be an even number, got {hidden} / {heads}"
    if not 16 <= ffn <= MAX_FFN or ffn % 16:
        return f"ffn: expected a multiple of 16 up to {MAX_FFN}, got {ffn}"
    if not 1 <= confidences <= MAX_CONFIDENCES:
        return f"confidences: expected 1 to {MAX_CONFIDENCES}, got {confidences}"
    return None


def packed_count(hidden: int, ffn: int, confidences: int) -> int:
    """Number of elements of the packed weights (order in ``csrc/ops/policy_forward.h``)."""
    d, f, k = hidden, ffn, confidences
    square = d * d + d
    return d // 2 + 2 * d + 12 * square + (d * k + d) + 3 * 2 * d + (f * d + f) + (d * f + d) + d + 1


def policy_forward(
    weights: PolicyWeights,
    mask: Tensor,
    confidence: Tensor,
    time: Tensor,
    rows: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """Unmasking logits of B generation buffers of L positions, without gradients.

    Computes what :class:`unmask.policies.network.PolicyNetwork` does (arXiv 2512.09106), to within 1e-4 of float64 for
    weights and inputs of order one, but much less of it: the conditioning has two values per sequence, the keys and
    values of a buffer lie in a space of a few dimensions when k is small, and queries, feed-forward and output are
    needed only where an action is possible.

    Args:
        weights: see :meth:`unmask.policies.learned.Policy.packed_weights`.
        mask: (B, L) bool, True = still masked.
        confidence: (B, L, k) float32, the k largest probabilities of each position, descending.
        time: (B,) float32, steps taken / L.
        rows: (B, L) bool, positions that need a logit; None = all.
        cond: (B, D) float32, added to the conditioning vector of each sequence; None = nothing.

    Returns:
        (B, L) float32 logits; -inf where ``rows`` is False. A sequence with a non-finite confidence or time has
        undefined logits; no other sequence is affected.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a size the op does not take, a wrong shape or device (the message names the argument).
    """
    _check(weights, mask, confidence, time, rows, cond)
    if mask.numel() == 0:
        return confidence.new_empty(mask.shape)
    return torch.ops.unmask.policy_forward(
        weights.packed.detach(),
        weights.hidden,
        weights.heads,
        weights.ffn,
        weights.confidences,
        mask,
        confidence.detach(),
        time.detach(),
        rows,
        None if cond is None else cond.detach(),
    )


def _check(
    weights: PolicyWeights, mask: Tensor, confidence: Tensor, time: Tensor, rows: Tensor | None, cond: Tensor | None
) -> None:
    packed, hidden, heads, ffn, confidences = weights
    problem = unsupported_sizes(hidden, heads, ffn, confidences)
    if problem is not None:
        raise ValueError(problem)
    if mask.dim() != 2:
        raise ValueError(f"mask: expected shape (B, L), got {tuple(mask.shape)}")
    batch, length = mask.shape
    float32 = torch.float32
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("mask", mask, (batch, length), torch.bool),
        ("confidence", confidence, (batch, length, confidences), float32),
        ("time", time, (batch,), float32),
        ("rows", rows, (batch, length), torch.bool),
        ("cond", cond, (batch, hidden), float32),
        ("weights.packed", packed, (packed_count(hidden, ffn, confidences),), float32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != mask.device:
            raise ValueError(f"{name}: expected device {mask.device} as mask, got {tensor.device}")


@torch.library.register_fake("unmask::policy_forward")
def _fake(
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
) -> Tensor:
    return confidence.new_empty(mask.shape)
