"""Result types of the ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopkConfidence(NamedTuple):
    """Softmax statistics of rows of logits (see :func:`unmask.ops.topk_confidence`)."""

    confidence: Tensor
    """(..., k) float32, descending."""
    token: Tensor
    """(..., k) int64."""
    sample: Tensor
    """(...) int64: the token to commit."""
    sample_confidence: Tensor
    """(...) float32: its probability."""
    logsumexp: Tensor | None = None
    """(...) float32, on request."""
    entropy: Tensor | None = None
    """(...) float32 in nats, on request."""


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
