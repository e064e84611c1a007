"""``topk_confidence`` in plain torch, by the contract of csrc/ops/topk_confidence.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.random import philox4x32, uniform
from unmask.ops.reference.checks import check, check_seed, check_tensor

_AT_ONCE = 2**23  # logits; bounds the memory of what is computed from them
_EXCLUDED = torch.iinfo(torch.int64).min


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
    check(logits.ndim >= 1 and logits.shape[-1] >= 1, "logits", "shape (..., V) with V >= 1", tuple(logits.shape))
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {str(logits.dtype)[6:]}")
    shape, vocab, excluded = tuple(logits.shape[:-1]), logits.shape[-1], sorted(set(exclude))
    check(len(excluded) <= 16, "exclude", "at most 16 ids", len(excluded))
    for token in excluded:
        check(0 <= token < vocab, "exclude", f"ids in [0, {vocab})", token)
    most = min(64, vocab - len(excluded))
    check(1 <= k <= most, "k", f"1 to {most} (at most 64, and {vocab - len(excluded)} candidates)", k)
    check(temperature == 0 or 1e-30 <= temperature <= 1e30, "temperature", "0 or 1e-30 to 1e30", temperature)
    check_seed(seed, temperature > 0, logits)
    source = logits.reshape(-1, vocab)
    chosen = torch.arange(len(source), device=logits.device)
    if rows is not None:
        check_tensor("rows", rows, torch.int64, (rows.numel(),), logits)
        shape, chosen = (rows.numel(),), rows
        if rows.device.type == "cpu":
            for place in ((rows < 0) | (rows >= len(source))).nonzero().flatten()[:1]:
                check(False, "rows", f"indices in [0, {len(source)})", f"{rows[place]} at {int(place)}")
    if select is not None:
        check_tensor("rows", select, torch.bool, shape, logits)
    if counter is None:
        counter = torch.stack((torch.zeros_like(chosen), chosen, torch.zeros_like(chosen)), dim=-1)
    else:
        check_tensor("counter", counter, torch.int64, (*shape, 3), logits)

    count = chosen.numel()
    keys = counter.reshape(-1, 3)
    results = (
        logits.new_zeros((count, k), dtype=dtype),
        logits.new_full((count, k), -1, dtype=torch.int64),
        logits.new_full((count,), -1, dtype=torch.int64),
        *(logits.new_zeros((count,), dtype=dtype) for _ in range(3)),
    )
    wanted = torch.arange(count, device=logits.device)
    if select is not None and select.device.type == "cpu":  # elsewhere the host would have to wait for the answer
        wanted = select.reshape(-1).nonzero().flatten()
    for part in wanted.split(max(1, _AT_ONCE // vocab)):
        x = source[chosen[part]].to(dtype)
        noise = None
        if temperature > 0:
            assert seed is not None
            noise = _gumbel(vocab, seed.reshape(-1), keys[part], dtype).addcmul_(
                x, x.new_tensor(1.0 / temperature, dtype=torch.float32).to(dtype)
            )
        for result, values in zip(results, _statistics(x, k, noise, excluded), strict=True):
            result[part] = values
    if select is not None and select.device.type != "cpu":
        for result in results:
            skipped = ~select.reshape(-1, *(1,) * (result.ndim - 1))
            result.masked_fill_(skipped, 0 if result.is_floating_point() else -1)
    confidence, token, sample, sample_confidence, lse, ent = results
    return (
        confidence.view(*shape, k),
        token.view(*shape, k),
        sample.view(shape),
        sample_confidence.view(shape),
        lse.view(shape) if logsumexp else lse.new_empty(0),
        ent.view(shape) if entropy else ent.new_empty(0),
    )


def _statistics(x: Tensor, k: int, score: Tensor | None, excluded: list[int]) -> tuple[Tensor, ...]:
    """Confidences and ids (N, k), sample, its confidence, logsumexp, entropy (N,) of ``x`` (N, V) and scores of it."""
    p = x.softmax(dim=-1)
    logsumexp = x.logsumexp(dim=-1)
    token = _order(x, excluded).topk(k, dim=-1).indices
    sample = token[:, 0] if score is None else _order(score, excluded).argmax(dim=-1)
    floats = (p.gather(1, token), p.gather(1, sample[:, None])[:, 0], logsumexp, torch.special.entr(p).sum(dim=-1))
    poisoned = ~logsumexp.isfinite()  # a NaN, a +inf, or nothing but -inf
    confidence, sample_confidence, logsumexp, entropy = (
        values.masked_fill(poisoned.view(-1, *(1,) * (values.ndim - 1)), float("nan")) for values in floats
    )
    token, sample = token.masked_fill(poisoned[:, None], -1), sample.masked_fill(poisoned, -1)
    return confidence, token, sample, sample_confidence, logsumexp, entropy


def _order(values: Tensor, excluded: list[int]) -> Tensor:
    """(N, V) distinct int64 in the order of the values in float32, equal ones by lowest id, excluded ids last."""
    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: the zeros are equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = (bits << 32) - torch.arange(values.shape[1], device=values.device)
    order[:, excluded] = _EXCLUDED
    return order


def _gumbel(vocab: int, seed: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, V) standard Gumbel draws of rows with ``keys`` (N, 3): sequence, position, step."""
    sequence, position, step = keys[:, :, None].unbind(1)
    index = torch.arange((vocab + 3) // 4, device=keys.device)
    words = torch.stack(philox4x32(seed, index, position, step, sequence), dim=-1).flatten(1)[:, :vocab]
    return -torch.log(-torch.log1p(-uniform(words).to(dtype)))
