"""``policy_forward``: the whole policy network in one call, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unmask.ops import library


class PolicyWeights(NamedTuple):
    """Weights of a policy network as :func:`unmask.ops.policy_forward` takes them."""

    packed: Tensor
    """1-D float32: all tensors of the network, flattened, in the order of ``csrc/ops/policy_forward.h``."""
    hidden: int
    """D: a multiple of 16, at most 256."""
    heads: int
    """D / heads must be even."""
    ffn: int
    """F: a multiple of 16, at most 1024."""
    confidences: int
    """k: 1 to 64."""


def unsupported_sizes(hidden: int, heads: int, ffn: int, confidences: int) -> str | None:
    """Why the op cannot take a network of these sizes, or None if it can."""
    if not 16 <= hidden <= 256 or hidden % 16:
        return f"hidden: expected a multiple of 16 up to 256, got {hidden}"
    if heads < 1 or hidden % heads or (hidden // heads) % 2:
        return f"heads: expected hidden / heads to be an even number, got {hidden} / {heads}"
    if not 16 <= ffn <= 1024 or ffn % 16:
        return f"ffn: expected a multiple of 16 up to 1024, got {ffn}"
    if not 1 <= confidences <= 64:
        return f"confidences: expected 1 to 64, got {confidences}"
    return None


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
    weights and inputs of order one, but much less of it: the conditioning has two values per sequence, queries,
    feed-forward and output are needed only where an action is possible, and when k is small the CPU's kernels keep keys
    and values in a space of a few dimensions.

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
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size the op does not take, a wrong shape or device; the message names the argument.
    """
    packed, *sizes = weights
    cond = None if cond is None else cond.detach()
    return library.call("policy_forward", packed.detach(), *sizes, mask, confidence.detach(), time.detach(), rows, cond)


@torch.library.register_fake("unmask::policy_forward")
def _fake(packed: Tensor, hidden: int, heads: int, ffn: int, confidences: int, mask: Tensor, *_: object) -> Tensor:
    return packed.new_empty(mask.shape)
