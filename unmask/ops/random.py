"""The kernels' seeds, and their counter-based generator in plain torch for the few draws made outside them."""

from __future__ import annotations

import torch
from torch import Tensor

ACTION_INDEX = 0x80000000  # kActionIndex of csrc/ops/random.h
_WORD = 0xFFFFFFFF


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """``seed``, 64 bits, as the (1,) int64 tensor that ops on ``device`` read. Raises TypeError or ValueError."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int or an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected device {device}, got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    # A fill, not a copy from the host: no synchronisation, and allowed in a graph capture.
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def _mul_hi_lo(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * word``, in int64 without overflow (16-bit halves)."""
    low, high = word & 0xFFFF, word >> 16
    a, b = low * constant, high * constant  # each below 2**48
    middle = (a >> 16) + (b & _WORD)
    return ((b >> 32) << 16) + (((b & _WORD) + (a >> 16)) >> 16), ((middle & 0xFFFF) << 16) | (a & 0xFFFF)


def philox_uniform(
    seed: int | Tensor, position: Tensor, step: Tensor, sequence: Tensor, index: int = ACTION_INDEX
) -> Tensor:
    """Float32 draws in (0, 1): word 0 of philox4x32-10 keyed by ``seed`` at (index, position, step, sequence).

    ``seed`` is an int or an int64 tensor of one element. The int64 arguments broadcast against each other. Equal to
    ``unmask::uniform`` of csrc/ops/random.h bit for bit (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011).
    """
    position, step, sequence = torch.broadcast_tensors(position & _WORD, step & _WORD, sequence & _WORD)
    c0, c1, c2, c3 = torch.full_like(position, index), position, step, sequence
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high2, low2 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    # One rounding to float32, as static_cast<float> and fmaf round; double holds the bits exactly.
    rounded = c0.to(torch.float32).to(torch.float64)
    uniform = (rounded * 2.0**-32 + 2.0**-33).to(torch.float32)
    return uniform.clamp_max(1 - 2.0**-24)
