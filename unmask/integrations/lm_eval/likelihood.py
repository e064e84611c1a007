"""The likelihood of a continuation under a masked diffusion model: LLaDA's estimate, exact where that is cheaper.

For a continuation of L tokens the estimate (arXiv 2502.09992, appendix) draws a number l of tokens to mask uniformly
from 1 to L and which ones uniformly, and averages ``L / l * sum of their log-probabilities`` given the rest and the
context. Its expectation bounds the log-likelihood from below; for one token it is the log-likelihood. There are
2^L - 1 ways to mask; where ``mc_num`` reaches that many, all are taken with their probabilities instead of drawn.

Under a block-causal model it is the sum over blocks: each block's tokens given those before it, estimated alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unmask.models.base import real_positions


def mask_patterns(length: int, mc_num: int, seed: int) -> tuple[Tensor, Tensor]:
    """What to mask, (N, length) bool, and the weight (N,) float64 of each pattern's summed log-probabilities.

    All 2^length - 1 patterns if these are no more than ``mc_num``, else ``mc_num`` random ones. The weights hold both
    the probability of a pattern and length / (number masked), so that the estimate is a plain sum.
    """
    if 2**length - 1 <= mc_num:
        numbers = torch.arange(1, 2**length)
        masked = (numbers[:, None] >> torch.arange(length)) & 1 == 1
        counts = masked.sum(dim=1)
        ways = torch.tensor([comb(length, int(c)) for c in counts], dtype=torch.float64)
        return masked, 1 / (counts * ways)  # 1 / L for l, 1 / ways for which, times L / l
    generator = torch.Generator().manual_seed(seed)
    # Evenly spaced draws behind one random offset: their mean is unbiased, and they cover 1..length evenly.
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    even = (torch.arange(mc_num, dtype=torch.float64) + offset) / mc_num
    counts = 1 + (even * length).long().clamp_max(length - 1)
    rank = torch.rand(mc_num, length, generator=generator).argsort(dim=1).argsort(dim=1)  # a random permutation each
    return rank < counts[:, None], length / (counts.double() * mc_num)


@torch.no_grad()
def loglikelihoods(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    padding_id: int,
    mc_num: int = 128,
    mc_batch_size: int = 32,
    seed: int = 0,
    block_length: int | None = None,
) -> list[float]:
    """The estimate for every pair (context ids, continuation ids), in nats; 0 for an empty continuation.

    ``model`` follows :class:`unmask.models.base.ModelBase`; ``mc_batch_size`` masked copies, of one pair or several,
    share a forward. A pair's patterns depend on ``seed`` and its length alone, not on its neighbours. ``block_length``
    is for block-causal models: that of their blocks, which count from a row's first token.
    """
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    parts = [part for i, pair in enumerate(pairs) for part in split(i, *pair, block_length, model.mask_token_id)]
    copies = (
        (owner, row, F.pad(masked, (start, len(row) - start - masked.shape[0])), weight)
        for owner, row, start, length in sorted(parts, key=lambda part: -len(part[1]))
        for masked, weight in zip(*mask_patterns(length, mc_num, seed), strict=True)
    )
    while chunk := list(islice(copies, mc_batch_size)):
        owners, rows, masks, weights = zip(*chunk, strict=True)
        ids, masked = left_padded(list(rows), padding_id), left_padded(list(masks), False)
        attention = left_padded([torch.ones_like(m) for m in masks], False)
        logp = masked_log_probabilities(model, ids, masked, attention, block_length)
        totals.index_add_(0, torch.tensor(owners), torch.stack(weights) * logp)
    return totals.tolist()


def split(
    owner: int, context: Sequence[int], continuation: Sequence[int], block_length: int | None, mask_token_id: int
) -> Iterator[tuple[int, Tensor, int, int]]:
    """A pair as one row, or as one for each block: owner, tokens (T,), where the part to predict begins, its length.

    In its last block the positions behind it are masked, as in decoding: what comes there is unknown.
    """
    tokens, start = [*context, *continuation], len(context)
    while start < len(tokens):
        end = len(tokens) if block_length is None else (start // block_length + 1) * block_length
        row = tokens[:end] + [mask_token_id] * (end - len(tokens))
        yield owner, torch.tensor(row), start, min(end, len(tokens)) - start
        start = end


def left_padded(rows: list[Tensor], value: int | bool) -> Tensor:
    """(N, T): rows of different lengths with ``value`` to their left."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def masked_log_probabilities(
    model: Any, ids: Tensor, masked: Tensor, attention: Tensor, block_length: int | None
) -> Tensor:
    """(N,) float64 on the CPU: per row, the summed log-probability of the tokens that ``masked`` (N, T) hides."""
    device = torch.device(model.device)
    hidden = ids.masked_fill(masked, model.mask_token_id).to(device)
    where = masked.flatten().nonzero().flatten()
    inputs = (hidden, None if bool(attention.all()) else attention.to(device))
    if block_length is None:
        logits = model(*inputs, positions=where.to(device))
    else:
        real = real_positions(attention)
        horizon = (~attention).sum(dim=1, keepdim=True) + (real // block_length + 1) * block_length - 1
        logits = model(*inputs, positions=where.to(device), horizon=horizon.to(device))
    losses = F.cross_entropy(logits.float(), ids.flatten()[where].to(device), reduction="none").double().cpu()
    return -torch.zeros(len(ids), dtype=torch.float64).index_add_(0, where // ids.shape[1], losses)
