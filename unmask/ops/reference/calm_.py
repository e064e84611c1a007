"""``calm_`` in plain torch, by the contract of csrc/ops/calm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops.library import fallback
from unmask.ops.reference.checks import check, check_tensors


@fallback
def calm_(
    logits: Tensor,
    previous: Tensor,
    calm_for: Tensor,
    steps: Tensor,
    positions: Tensor | None,
    excluded: int,
    bound: float,
    needed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Arguments and result of the op; ``dtype`` is that of the arithmetic."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}".replace("torch.", ""))
    full = logits.ndim == 3 and min(logits.shape[1:]) >= 1
    check(full, "logits", "shape (B, S, V) with S and V >= 1", tuple(logits.shape))
    check(calm_for.ndim == 2, "calm_for", "shape (B, L)", tuple(calm_for.shape))
    same = positions is not None or logits.shape[1] == calm_for.shape[1]
    check(same, "logits", "all L positions, or positions", tuple(logits.shape))
    check(needed >= 0, "needed", "at least 0", needed)
    check_tensors(
        {},
        logits,
        logits=(logits, logits.dtype, "BSV"),
        previous=(previous, logits.dtype, "BSV"),
        calm_for=(calm_for, torch.int32, "BL"),
        positions=(positions, torch.int64, "BS"),
        steps=(steps, torch.int64, "B"),
    )
    for name, tensor in (("previous", previous), ("calm_for", calm_for)):
        check(tensor.is_contiguous(), name, "a contiguous tensor, as it is written in place", tensor.stride())
    length = calm_for.shape[1]
    at = torch.arange(length, device=logits.device).expand(logits.shape[:2]) if positions is None else positions
    taken = (at >= 0) & (at < length) & (at != torch.cat((at.new_full((len(at), 1), -1), at[:, :-1]), dim=1))
    here = torch.where(taken, at, length)  # what is left out goes behind the buffer
    before = torch.cat((calm_for, calm_for.new_zeros(len(calm_for), 1)), dim=1).gather(1, here)
    before = before.masked_fill((steps <= 0)[:, None], 0)
    divergence = _divergence(logits, previous, excluded, dtype).float().masked_fill(before == 0, torch.inf)
    previous[taken] = logits[taken]
    after = torch.where(divergence < bound, before + 1, 1)
    calm_for.copy_(calm_for.new_zeros(len(calm_for), length + 1).scatter(1, here, after)[:, :length])
    return calm_for > needed, divergence


def _divergence(logits: Tensor, previous: Tensor, excluded: int, dtype: torch.dtype) -> Tensor:
    """KL(softmax(logits) || softmax(previous)) without the token ``excluded``, in nats."""
    out = torch.arange(logits.shape[-1], device=logits.device) == excluded
    log_p, log_q = (t.to(dtype).masked_fill(out, -torch.inf).log_softmax(dim=-1) for t in (logits, previous))
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1).clamp_min(0)
