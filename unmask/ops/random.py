"""The kernels' seeds, and their counter-based generator in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

ACTION_INDEX, STOP_INDEX = 0x80000000, 0x80000001  # kActionIndex and kStopIndex of csrc/ops/random.h
_WORD = 0xFFFFFFFF


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """``seed``, 64 bits, as the (1,) int64 tensor that ops on ``device`` read; a tensor is for them to check."""
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    # A fill, not a copy from the host: no synchronisation, and allowed in a graph capture.
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def _high_low(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * word``, in int64 without overflow (16-bit halves)."""
    low, high = constant * (word & 0xFFFF), constant * (word >> 16)  # each below 2**48
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox4x32(
    seed: int | Tensor, index: int | Tensor, position: Tensor, step: Tensor, sequence: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of philox4x32-10 keyed by ``seed`` at the counter (index, position, step, sequence).

    ``seed`` is an int or an int64 tensor of one element; the int64 tensors of the counter broadcast against each other,
    and 32 bits of each count. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    counter = (torch.full_like(position, index) if isinstance(index, int) else index, position, step, sequence)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & _WORD for word in counter))
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (high0, low0), (high2, low2) = _high_low(0xD2511F53, c0), _high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """32 random bits as float32 in (0, 1), equal to ``unmask::uniform`` of csrc/ops/random.h bit for bit."""
    # Only the conversion and the sum round, as there: the product by a power of two is exact.
    return (word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)


def philox_uniform(
    seed: int | Tensor, position: Tensor, step: Tensor, sequence: Tensor, index: int = ACTION_INDEX
) -> Tensor:
    """Float32 draws in (0, 1) from word 0 of :func:`philox4x32`."""
    return uniform(philox4x32(seed, index, position, step, sequence)[0])
