"""``topk_confidence``: softmax statistics of rows of logits in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.ops import library  # noqa: F401  (registers the op)
from unmask.ops.random import seed_tensor
from unmask.ops.types import TopkConfidence

MAX_TOP_K = 64
MAX_EXCLUDE = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def topk_confidence(
    logits: Tensor,
    k: int = 1,
    *,
    rows: Tensor | None = None,
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
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device or value; the message names the argument.
        RuntimeError: on CPU, an index in ``rows`` out of range (on CUDA such a row comes out as NaN and -1).
    """
    excluded = _excluded(exclude)
    _check(logits, k, rows, temperature, counter, excluded)
    index, select = (None, rows) if rows is not None and rows.dtype == torch.bool else (rows, None)
    confidence, token, sample, sample_confidence, lse, ent = torch.ops.unmask.topk_confidence(
        logits.detach(),
        k,
        index,
        select,
        float(temperature),
        seed_tensor(seed, logits.device) if temperature > 0 else None,
        counter if temperature > 0 else None,
        excluded,
        logsumexp,
        entropy,
    )
    return TopkConfidence(
        confidence, token, sample, sample_confidence, lse if logsumexp else None, ent if entropy else None
    )


def _excluded(exclude: Sequence[int]) -> list[int]:
    """The distinct ids of ``exclude`` in order."""
    if not isinstance(exclude, Sequence) or not all(hasattr(i, "__index__") for i in exclude):
        raise TypeError(f"exclude: expected a sequence of ids, got {exclude!r}")
    return sorted({int(i) for i in exclude})


def _check(
    logits: Tensor, k: int, rows: Tensor | None, temperature: float, counter: Tensor | None, excluded: list[int]
) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    if len(excluded) > MAX_EXCLUDE:
        raise ValueError(f"exclude: expected at most {MAX_EXCLUDE} ids, got {len(excluded)}")
    for token in excluded:
        if not 0 <= token < vocab:
            raise ValueError(f"exclude: expected ids in [0, {vocab}), got {token}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {k!r}")
    most = min(MAX_TOP_K, vocab - len(excluded))
    if not 1 <= k <= most:
        raise ValueError(
            f"k: expected 1 to {most} (at most {MAX_TOP_K} and {vocab - len(excluded)} candidates), got {k}"
        )
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number, got {temperature!r}")
    if temperature != 0 and not 1e-30 <= temperature <= 1e30:  # also refuses NaN
        raise ValueError(f"temperature: expected 0 or a number from 1e-30 to 1e30, got {temperature}")
    shape = _check_rows(logits, rows)
    if counter is None:
        return
    if counter.dtype != torch.int64:
        raise TypeError(f"counter: expected int64, got {counter.dtype}")
    if counter.shape != (*shape, 3):
        raise ValueError(f"counter: expected shape {(*shape, 3)}, got {tuple(counter.shape)}")
    if counter.device != logits.device:
        raise ValueError(f"counter: expected device {logits.device} as logits, got {counter.device}")


def _check_rows(logits: Tensor, rows: Tensor | None) -> tuple[int, ...]:
    """Checks ``rows``; returns the shape of an output of one number per row."""
    shape = tuple(logits.shape[:-1])
    if rows is None:
        return shape
    if rows.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"rows: expected bool or int64, got {rows.dtype}")
    if rows.device != logits.device:
        raise ValueError(f"rows: expected device {logits.device} as logits, got {rows.device}")
    if rows.dtype == torch.bool:
        if rows.shape != shape:
            raise ValueError(f"rows: expected shape {shape} as the rows of logits, got {tuple(rows.shape)}")
        return shape
    if rows.dim() != 1:
        raise ValueError(f"rows: expected int64 indices of shape (R,), got {tuple(rows.shape)}")
    return tuple(rows.shape)


@torch.library.register_fake("unmask::topk_confidence")
def _fake(
    logits: Tensor,
    k: int,
    rows: Tensor | None,
    select: Tensor | None,
    temperature: float,
    seed: Tensor | None,
    counter: Tensor | None,
    exclude: Sequence[int],
    logsumexp: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = tuple(logits.shape[:-1]) if rows is None else tuple(rows.shape)
    floats = logits.new_empty(shape, dtype=torch.float32)
    return (
        logits.new_empty((*shape, k), dtype=torch.float32),
        logits.new_empty((*shape, k), dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.int64),
        floats,
        logits.new_empty(shape if logsumexp else (0,), dtype=torch.float32),
        logits.new_empty(shape if entropy else (0,), dtype=torch.float32),
    )
