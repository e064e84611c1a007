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


class Proposals(NamedTuple):
    """What a set policy reads in one step of B buffers of L positions."""

    tokens: Tensor
    """(B, L) int64: the buffer."""
    candidates: Tensor
    """(B, L) int64: the proposals."""
    mask: Tensor
    """(B, L) bool: masked."""
    region: Tensor
    """(B, L) bool: where the proposals are read; elsewhere the buffer's token is, and no probability."""
    confidence: Tensor
    """(B, L, k) float32: the largest probabilities of each position; a NaN counts as 0."""
    probability: Tensor
    """(B, L) float32: that of the proposal; a NaN counts as 0."""
    bias: Tensor | None = None
    """(B, L) float32, added to the logits of the predictions; None: nothing."""


def select_set(
    weights: SetWeights, table: Tensor, proposals: Proposals, allowed: Tensor, risk: Tensor, sure: float, runs: int
) -> tuple[Tensor, Tensor]:
    """The positions to commit in one step, each row by itself. Nothing waits for the device.

    In each of at most ``runs`` runs the network predicts of every allowed position, given those picked so far, the
    probability p that its proposal survives. All with p above ``sure``, or above exp(-risk) where that is more, are
    picked. Then the most probable of the others is, if -log p summed over such picks stays within ``risk``; the very
    first pick of a row costs nothing, so that at least one is made. A row in which a run picks nothing has ended, and
    costs nothing from there on. The kernels keep of the run before what a pick does not change, and run the last layer
    only where something may be picked.

    Args:
        weights: see :meth:`unmask.policies.set_policy.SetPolicy.packed_weights`.
        table: (N, D) float32, added to the network's inputs by the number of the token; numbers are clamped to it.
        proposals: what the network reads.
        allowed: (B, L) bool, what may be picked.
        risk: (B,) float32, at least 0.
        sure: between 0 and 1.
        runs: at least 1.

    Returns:
        (B, L) bool, the positions picked, and (B, L) float32, p of the first run, 0 where not ``allowed``. The error of
        p is below 1e-5 for weights and inputs of order one, so that picks may differ from those of exact arithmetic
        where p, or a sum of costs, lies that near to what decides.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size the op does not take, a wrong shape or device; the message names the argument.
    """
    packed, *sizes = weights
    read = [None if t is None else t.detach() for t in proposals]
    arguments = (*sizes, table.detach(), *read, allowed, risk.detach(), sure, runs)
    return library.call("select_set", packed.detach(), *arguments)


@torch.library.register_fake("unmask::select_set")
def _fake(packed: Tensor, hidden: int, heads: int, ffn: int, layers: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    shape = tensors[1].shape
    return packed.new_empty(shape, dtype=torch.bool), packed.new_empty(shape)
