"""``topk_confidence``: softmax statistics of rows of logits in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.ops import library
from unmask.ops.random import seed_tensor


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


def topk_confidence(
    logits: Tensor,
    k: int = 1,
    *,
    rows: Tensor | None = None,
    read: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor = 0,
    counter: Tensor | None = None,
    exclude: Sequence[int] = (),
    logsumexp: bool = False,
    entropy: bool = False,
) -> TopkConfidence:
    """The k largest softmax probabilities of each row, their ids, and the token to commit.

    With p = softmax(x) of a row x over all V entries, in at least float32 accuracy (error below 1e-5 at V = 126464):
    the k largest p in descending order, equal logits by lowest id. At temperature 0 the token to commit is the first
    of them. At T > 0 it is an exact draw from softmax(x / T) by the Gumbel-max trick (Maddison et al., "A* Sampling",
    2014), with a counter-based generator (Philox4x32-10, Salmon et al., 2011): the same seed and counter give the same
    token in any batch and on any device.

    Args:
        logits: (..., V) float32, bfloat16 or float16; rows may be strided, V should be contiguous (else it is copied).
        k: 1 to 64, and at most the number of candidates (V without ``exclude``).
        rows: None = all rows. int64 (R,): flat indices of the rows to read, any number of times and in any order; the
            outputs then have shape (R, ...). bool of shape ``logits.shape[:-1]``: rows that are False are not read and
            come out with confidence 0, ids -1, logsumexp 0 and entropy 0.
        read: bool (R,), beside indices in ``rows``: those that are False are not read, whatever the index.
        temperature: of the draw, 0 or from 1e-30 to 1e30; it does not change the confidences.
        seed: of the draws; an int, or an int64 tensor of one element on the device of the logits (so that a captured
            CUDA graph can change it).
        counter: int64 (*output shape, 3): sequence, position and step of each row, low 32 bits of each. None means
            sequence 0, the flat row index as position, and step 0.
        exclude: at most 16 ids that are never chosen; they keep their share of the denominator.
        logsumexp: whether to return log sum exp x.
        entropy: whether to return -sum p log p, in nats.

    Returns:
        :class:`TopkConfidence`. A row whose softmax is undefined (a NaN, a +inf, or nothing but -inf) has NaN in all
        floats and -1 in all ids.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; the message names the argument. An index in ``rows`` out of range
            is one on the CPU; on CUDA such a row comes out as NaN and -1.
    """
    logits = logits.detach() if isinstance(logits, Tensor) else logits  # what else it is, the op refuses
    flags = isinstance(rows, Tensor) and rows.dtype == torch.bool
    by = (None, rows) if flags else (rows, read)
    key = seed_tensor(seed, logits.device) if temperature != 0 else None
    exclude = list(exclude) if isinstance(exclude, Sequence) else exclude
    confidence, token, sample, sample_confidence, lse, ent = library.call(
        "topk_confidence", logits, k, *by, temperature, key, counter, exclude, logsumexp, entropy
    )
    return TopkConfidence(
        confidence, token, sample, sample_confidence, lse if logsumexp else None, ent if entropy else None
    )


@torch.library.register_fake("unmask::topk_confidence")
def _fake(logits: Tensor, k: int, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    shape = tuple(logits.shape[:-1]) if rows is None else tuple(rows.shape)
    asked = [shape if wanted else (0,) for wanted in rest[-2:]]  # logsumexp, entropy
    floats = [logits.new_empty(size, dtype=torch.float32) for size in ((*shape, k), shape, *asked)]
    ids = [logits.new_empty(size, dtype=torch.int64) for size in ((*shape, k), shape)]
    return floats[0], *ids, *floats[1:]
