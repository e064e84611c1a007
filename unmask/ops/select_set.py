"""``select_set``: what a set policy commits in one step, by its network inside a selection loop, in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unmask.ops import library


class SetWeights(NamedTuple):
    """Weights of a set policy as :func:`unmask.ops.select_set` takes them."""

    packed: Tensor
    """1-D float32: all tensors, flattened, in the order of ``csrc/ops/select_set.h``."""
    hidden: int
    """D: a multiple of 16, at most 256."""
    heads: int
    """D / heads must be even."""
    ffn: int
    """F: a multiple of 16, at most 1024."""
    layers: int
    """1 to 8."""


def select_set(
    weights: SetWeights, x: Tensor, prior: Tensor, allowed: Tensor, risk: Tensor, sure: float, runs: int
) -> tuple[Tensor, Tensor]:
    """The positions to commit in one step, for B buffers of L positions, each by itself. Nothing waits for the device.

    In each of at most ``runs`` runs p = sigmoid(prior + network) of every allowed position, given those picked so far.
    All with p above ``sure``, or above exp(-risk) where that is more, are picked. Then the most probable of the others
    is, if -log p summed over such picks stays within ``risk``; the very first pick of a row costs nothing, so that at
    least one is made. A row in which a run picks nothing has ended, and costs nothing from there on. The kernels keep
    of the run before what a pick does not change, and run the last layer only where something may be picked.

    Args:
        weights: see :meth:`unmask.policies.set_policy.SetPolicy.packed_weights`.
        x: (B, L, D) float32, the network's inputs where nothing is picked.
        prior: (B, L) float32 logits, to which the network's output is added.
        allowed: (B, L) bool.
        risk: (B,) float32, at least 0.
        sure: between 0 and 1.
        runs: at least 1.

    Returns:
        (B, L) bool, the positions picked, and (B, L) float32, p of the first run, 0 where not ``allowed``. The error of
        p is below 1e-5 for weights and inputs of order one, so that picks may differ from those of exact arithmetic
        where p, or a sum of costs, lies that near to what decides. A row with a NaN or an infinity has undefined picks.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size the op does not take, a wrong shape or device; the message names the argument.
    """
    packed, *sizes = weights
    tensors = (x.detach(), prior.detach(), allowed, risk.detach())
    return library.call("select_set", packed.detach(), *sizes, *tensors, sure, runs)


@torch.library.register_fake("unmask::select_set")
def _fake(
    packed: Tensor, hidden: int, heads: int, ffn: int, layers: int, x: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.bool), x.new_empty(x.shape[:2])
