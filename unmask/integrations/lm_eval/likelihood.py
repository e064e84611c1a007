"""The likelihood of a continuation under a masked diffusion model: LLaDA's estimate, exact where that is cheaper.

For a continuation of L tokens the estimate (arXiv 2502.09992, appendix) draws a number l of tokens to mask uniformly
from 1 to L and which ones uniformly, and averages ``L / l * sum of their log-probabilities`` given the rest and the
context. Its expectation bounds the log-likelihood from below; for one token it is the log-likelihood. There are
2^L - 1 ways to mask; where ``mc_num`` reaches that many, all are taken with their probabilities instead of drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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
) -> list[float]:
    """The estimate for every pair (context ids, continuation ids), in nats; 0 for an empty continuation.

    ``model`` follows :class:`unmask.models.base.ModelBase`; ``mc_batch_size`` masked copies, of one pair or several,
    share a forward. A pair's patterns depend on ``seed`` and its length alone, not on its neighbours.
    """
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    longest_first = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    copies = (
        (i, masked, weight)
        for i in longest_first
        if pairs[i][1]
        for masked, weight in zip(*mask_patterns(len(pairs[i][1]), mc_num, seed), strict=True)
    )
    while chunk := list(islice(copies, mc_batch_size)):
        owners = torch.tensor([i for i, _, _ in chunk])
        ids = left_padded([torch.tensor([*pairs[i][0], *pairs[i][1]]) for i, _, _ in chunk], padding_id)
        masked = left_padded([F.pad(m, (len(pairs[i][0]), 0)) for i, m, _ in chunk], False)
        attention = left_padded([torch.ones(len(pairs[i][0]) + len(m), dtype=torch.bool) for i, m, _ in chunk], False)
        logp = masked_log_probabilities(model, ids, masked, None if bool(attention.all()) else attention)
        totals.index_add_(0, owners, torch.stack([weight for _, _, weight in chunk]) * logp)
    return totals.tolist()


def left_padded(rows: list[Tensor], value: int | bool) -> Tensor:
    """(N, T): rows of different lengths with ``value`` to their left."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def masked_log_probabilities(model: Any, ids: Tensor, masked: Tensor, attention: Tensor | None) -> Tensor:
    """(N,) float64 on the CPU: per row, the summed log-probability of the tokens that ``masked`` (N, T) hides."""
    device = torch.device(model.device)
    hidden = ids.masked_fill(masked, model.mask_token_id).to(device)
    where = masked.flatten().nonzero().flatten()
    logits = model(hidden, None if attention is None else attention.to(device), positions=where.to(device))
    losses = F.cross_entropy(logits.float(), ids.flatten()[where].to(device), reduction="none").double().cpu()
    return -torch.zeros(len(ids), dtype=torch.float64).index_add_(0, where // ids.shape[1], losses)
