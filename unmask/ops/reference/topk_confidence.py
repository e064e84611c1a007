"""The truth of ``topk_confidence``: plain torch in float64, and the generator in exact integer arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmask.ops.types import TopkConfidence

_WORD = np.uint64(0xFFFFFFFF)


def philox4x32(seed: int, index: np.ndarray, position: int, step: int, sequence: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) as csrc/ops/random.h orders its counters.

    ``index``: (N,) integers. Returns (N, 4) uint32, the words of each draw.
    """
    c0 = index.astype(np.uint64) & _WORD
    c1, c2, c3 = (np.full_like(c0, value & 0xFFFFFFFF) for value in (position, step, sequence))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _WORD,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(bits: np.ndarray) -> np.ndarray:
    """uint32 bits to float32 draws in (0, 1), rounded as the kernels round them."""
    rounded = bits.astype(np.float32).astype(np.float64)  # a double holds the sum below without rounding
    return np.minimum((rounded * 2.0**-32 + 2.0**-33).astype(np.float32), np.float32(1 - 2.0**-24))


def gumbel(bits: np.ndarray) -> np.ndarray:
    """uint32 bits to standard Gumbel draws -log(-log(1 - u)), float64."""
    return -np.log(-np.log1p(-uniform(bits).astype(np.float64)))


def token_gumbels(vocab: int, seed: int, position: int, step: int, sequence: int) -> np.ndarray:
    """(V,) float64: the Gumbel draw of each token of a row."""
    words = philox4x32(seed, np.arange((vocab + 3) // 4), position, step, sequence)
    return gumbel(words.reshape(-1)[:vocab])


def topk_confidence(
    logits: Tensor,
    k: int = 1,
    *,
    rows: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    counter: Tensor | None = None,
    exclude: Sequence[int] = (),
    logsumexp: bool = False,
    entropy: bool = False,
) -> TopkConfidence:
    """Same arguments and results as :func:`unmask.ops.topk_confidence`; floats are float64, tensors on the CPU.

    A draw is computed in float64; a kernel's float32 scores can prefer another token only where two scores differ by
    less than its rounding.
    """
    source = logits.detach().cpu()
    flat = source.reshape(-1, source.shape[-1])
    shape = tuple(source.shape[:-1])
    chosen: list[int | None] = list(range(flat.shape[0]))
    if rows is not None and rows.dtype == torch.bool:
        chosen = [i if keep else None for i, keep in enumerate(rows.reshape(-1).tolist())]
    elif rows is not None:
        chosen, shape = list(rows.tolist()), tuple(rows.shape)
    counters = None if counter is None else counter.reshape(-1, 3).tolist()
    keys = [(0, i or 0, 0) for i in chosen] if counters is None else counters
    results = [
        _skipped(k) if row is None else _row(flat[row].double(), k, temperature, seed, key, exclude)
        for row, key in zip(chosen, keys, strict=True)
    ]

    def stack(place: int, dtype: torch.dtype, tail: tuple[int, ...] = ()) -> Tensor:
        return torch.tensor([r[place] for r in results], dtype=dtype).reshape((*shape, *tail))

    return TopkConfidence(
        stack(0, torch.float64, (k,)),
        stack(1, torch.int64, (k,)),
        stack(2, torch.int64),
        stack(3, torch.float64),
        stack(4, torch.float64) if logsumexp else None,
        stack(5, torch.float64) if entropy else None,
    )


_Row = tuple[list[float], list[int], int, float, float, float]


def _skipped(k: int) -> _Row:
    return [0.0] * k, [-1] * k, -1, 0.0, 0.0, 0.0


def _row(x: Tensor, k: int, temperature: float, seed: int, key: tuple[int, int, int], exclude: Sequence[int]) -> _Row:
    """One row: confidences, ids, sample, its confidence, logsumexp, entropy."""
    nan = float("nan")
    if x.isnan().any() or (x == float("inf")).any() or (x == float("-inf")).all():
        return [nan] * k, [-1] * k, -1, nan, nan, nan
    p = torch.softmax(x, dim=0)
    lse = torch.logsumexp(x, dim=0)
    # A stable sort keeps equal logits in the order of their ids.
    order = torch.sort(x, descending=True, stable=True).indices
    banned = torch.zeros_like(x, dtype=torch.bool)
    banned[list(exclude)] = True
    top = order[~banned[order]][:k]
    sample = int(top[0])
    if temperature > 0:
        sequence, position, step = key
        inverse = float(np.float32(1.0 / temperature))
        score = torch.from_numpy(token_gumbels(len(x), seed, position, step, sequence)) + x * inverse
        candidates = (~banned).nonzero().flatten()
        sample = int(candidates[score[candidates].argmax()])
    entropy = -torch.special.xlogy(p, p).sum()
    return p[top].tolist(), top.tolist(), sample, float(p[sample]), float(lse), float(entropy)
