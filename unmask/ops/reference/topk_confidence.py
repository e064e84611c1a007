"""``topk_confidence`` in plain torch, by the contract of csrc/ops/topk_confidence.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.random import philox4x32, uniform
from unmask.ops.reference.checks import check, check_seed, check_tensors, wide_dtype

_AT_ONCE = 2**23  # logits; bounds the memory of what is computed from them


@fallback
def topk_confidence(
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
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Arguments and result of the op; floats are computed and returned in ``dtype``.

    A draw compares scores rounded to float32; where two differ by less than the rounding of their parts, a kernel may
    prefer the other.
    """
    excluded = _check_logits(logits, k, temperature, exclude)
    check_seed(seed, temperature > 0, logits)
    source = logits.reshape(-1, logits.shape[-1])
    count, vocab = source.shape
    shape, chosen = tuple(logits.shape[:-1]), torch.arange(count, device=logits.device)
    if rows is not None:
        check_tensors({}, logits, rows=(rows, torch.int64, "R"))
        shape, chosen = tuple(rows.shape), rows
        outside = (rows < 0) | (rows >= count)
        outside = outside if select is None else outside & select
        bad = outside.nonzero() if rows.device.type == "cpu" else rows[:0]
        if len(bad):
            check(False, "rows", f"indices in [0, {count})", f"{int(rows[bad[0]])} at {int(bad[0])}")
    sizes = {chr(65 + axis): size for axis, size in enumerate((*shape, 3))}
    check_tensors(sizes, logits, **{"rows" if rows is None else "read": (select, torch.bool, "".join(sizes)[:-1])})
    chosen = chosen if select is None else chosen.masked_fill(~select.flatten(), 0)
    check_tensors(sizes, logits, counter=(counter, torch.int64, "".join(sizes)))

    nothing = torch.zeros_like(chosen)
    keys = torch.stack((nothing, chosen, nothing), dim=1) if counter is None else counter.reshape(-1, 3)
    parts = []
    for part in torch.arange(len(chosen), device=logits.device).split(max(1, _AT_ONCE // vocab)):
        x, score = source[chosen[part]].to(dtype), None
        if temperature > 0:
            assert seed is not None
            inverse = float(torch.tensor(1.0 / temperature, dtype=torch.float32))
            score = x * inverse + _gumbel(vocab, seed, keys[part], dtype)
        parts.append(_statistics(x, k, score, excluded))
    results = [torch.cat(values) for values in zip(*parts, strict=True)]
    if select is not None:
        for result in results:
            skipped = ~select.reshape(-1, *(1,) * (result.ndim - 1))
            result.masked_fill_(skipped, 0 if result.is_floating_point() else -1)
    results = [result.view((*shape, *result.shape[1:])) for result in results]
    asked = (True, True, True, True, logsumexp, entropy)
    return tuple(result if wanted else result.new_empty(0) for result, wanted in zip(results, asked, strict=True))


def _check_logits(logits: Tensor, k: int, temperature: float, exclude: Sequence[int]) -> list[int]:
    """The distinct ids of ``exclude``."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {str(logits.dtype)[6:]}")
    check(logits.ndim >= 1 and logits.shape[-1] >= 1, "logits", "shape (..., V) with V >= 1", tuple(logits.shape))
    vocab, excluded = logits.shape[-1], sorted(set(exclude))
    check(len(excluded) <= 16, "exclude", "at most 16 ids", len(excluded))
    for token in excluded:
        check(0 <= token < vocab, "exclude", f"ids in [0, {vocab})", token)
    candidates = vocab - len(excluded)
    most = min(64, candidates)
    check(1 <= k <= most, "k", f"1 to {most} (at most 64, and {candidates} candidates)", k)
    check(temperature == 0 or 1e-30 <= temperature <= 1e30, "temperature", "0 or 1e-30 to 1e30", temperature)
    return excluded


def _statistics(x: Tensor, k: int, score: Tensor | None, excluded: list[int]) -> tuple[Tensor, ...]:
    """Confidences and ids (N, k), sample, its confidence, logsumexp, entropy (N,) of ``x`` (N, V) and scores of it."""
    top = x.amax(dim=-1, keepdim=True)
    below = x - top
    weights = below.exp()
    # Sums of float32 would drift.
    total = weights.sum(dim=-1, keepdim=True, dtype=wide_dtype(x.device))
    moment = (weights * below.masked_fill(weights == 0, 0.0)).sum(dim=-1, keepdim=True, dtype=total.dtype)
    logsumexp, entropy = top + total.log(), total.log() - moment / total
    token = _order(x, excluded).topk(k, dim=-1).indices
    sample = token[:, :1] if score is None else _order(score, excluded).argmax(dim=-1, keepdim=True)
    floats = weights.gather(1, token) / total, weights.gather(1, sample) / total, logsumexp, entropy
    poisoned = ~total.isfinite()  # a NaN, a +inf, or nothing but -inf
    confidence, chosen, logsumexp, entropy = (value.masked_fill(poisoned, torch.nan).to(x.dtype) for value in floats)
    token, sample = token.masked_fill(poisoned, -1), sample.masked_fill(poisoned, -1)
    return confidence, token, sample[:, 0], chosen[:, 0], logsumexp[:, 0], entropy[:, 0]


def _order(values: Tensor, excluded: list[int]) -> Tensor:
    """(N, V) distinct int64 in the order of the values in float32, equal ones by lowest id, excluded ids last."""
    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: the zeros are equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = (bits << 32) - torch.arange(values.shape[1], device=values.device)
    for token in excluded:
        order[:, token] = torch.iinfo(torch.int64).min
    return order


def _gumbel(vocab: int, seed: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, V) standard Gumbel draws of rows with ``keys`` (N, 3): sequence, position, step."""
    sequence, position, step = keys[:, :, None].unbind(1)
    index = torch.arange((vocab + 3) // 4, device=keys.device)
    words = torch.stack(philox4x32(seed, index, position, step, sequence), dim=-1).flatten(1)[:, :vocab]
    return -torch.log(-torch.log1p(-uniform(words).to(dtype)))
