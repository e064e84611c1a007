"""What changes a model's logits before they are reduced: guidance and the repetition penalty; and what is left out of a
draw: top_k and top_p.

These are plain torch on all logits that a forward gives, and cost nothing unless they are asked for. Each row is
computed by itself, nothing waits for the device, and a captured CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmask.sampling.config import SamplerConfig
from unmask.sampling.state import State

AT_ONCE = 2**25
"""Logits that are sorted at once for ``top_p``; about 24 bytes of memory each."""
FEW = 1024
"""On the CPU, where the host need not wait to look, ``top_p`` tries so many tokens before it sorts all."""


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, float32: uncond + (scale + 1) * (cond - uncond), as LLaDA's own code has it."""
    without = unconditional.float()
    return without + (scale + 1) * (conditional.float() - without)


def penalised(logits: Tensor, state: State, positions: Tensor | None, penalty: float) -> Tensor:
    """``logits`` (N, S, V) in float32 with tokens that the row already has made less probable (``penalty`` > 1).

    The tokens are the prompt's and the committed ones, as for transformers' decoder-only models. A committed token that
    may be revised does not count at its own position.
    """
    index = torch.arange(state.start + state.horizon, device=logits.device)
    tokens = state.tokens[:, : len(index)]
    known = ~nn.functional.pad(state.mask, (state.start, 0))[:, : len(index)]
    if state.attention is not None:
        known &= state.attention[:, : len(index)]
    counts = torch.zeros_like(logits[:, 0], dtype=torch.int64).scatter_add_(1, tokens, known.long())
    own = state.buffer if positions is None else state.buffer.gather(1, positions)
    repeated = counts.gather(1, tokens)[:, None] > (own[:, :, None] == tokens[:, None]).long()
    where = tokens[:, None].expand(repeated.shape)
    values = logits.float().gather(2, where)
    changed = torch.where(values < 0, values * penalty, values / penalty)
    return logits.float().scatter(2, where, torch.where(repeated, changed, values))


def narrowed(logits: Tensor, config: SamplerConfig, exclude: Tensor) -> Tensor:
    """``logits`` (..., V) with -inf for what ``top_k`` and ``top_p`` leave out, and for the ids ``exclude`` (E,).

    As in transformers, ``top_k`` comes first and ``top_p`` is a share of what it leaves, at ``temperature``. Tokens
    as probable as the last one kept are kept, too, so that the result does not depend on the order of sorting.
    """
    logits = logits.index_fill(-1, exclude, float("-inf"))
    vocab = logits.shape[-1]
    least = [lowest(part, config) for part in logits.reshape(-1, vocab).split(max(1, AT_ONCE // vocab))]
    return logits.masked_fill(logits < torch.cat(least).view(*logits.shape[:-1], 1), float("-inf"))


def lowest(logits: Tensor, config: SamplerConfig) -> Tensor:
    """(R, 1): the lowest of each row's ``logits`` (R, V) that is kept; of undefined rows, any."""
    vocab, share = logits.shape[-1], 1.0 if config.top_p is None else config.top_p
    if config.top_k is not None:
        best = logits.topk(min(config.top_k, vocab), dim=-1).values
        return best[:, -1:] if share == 1 else nucleus(best, best, config.temperature, share)[0]
    if logits.device.type == "cpu" and vocab > FEW:
        least, found = nucleus(logits.topk(FEW, dim=-1).values, logits, config.temperature, share)
        if rest := (~found).nonzero().flatten().tolist():
            least[rest] = nucleus(logits[rest].sort(descending=True).values, logits[rest], config.temperature, share)[0]
        return least
    return nucleus(logits.sort(dim=-1, descending=True).values, logits, config.temperature, share)[0]


def nucleus(best: Tensor, among: Tensor, temperature: float, share: float) -> tuple[Tensor, Tensor]:
    """(R, 1): the last of ``best`` (R, K), the highest logits in order, that is needed for ``share`` of all ``among``
    (R, V); and (R,) bool: whether ``best`` has that share."""
    # In float64, so that sums do not depend on how a device splits them.
    total = ((among.float() - best[:, :1].float()) / temperature).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    part = ((best.float() - best[:, :1].float()) / temperature).exp().double() / total
    mass = part.cumsum(dim=-1)
    kept = (mass - part < share).sum(dim=-1, keepdim=True)
    return best.gather(-1, (kept - 1).clamp_min(0)), mass[:, -1] >= share
