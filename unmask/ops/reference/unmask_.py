"""The truth of ``unmask_``: one position at a time in Python integers and float64.

Written from the contract, not from the kernels, with its own Philox; slow, and meant for tests only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, COMPLETE, EXHAUSTED, POISONED = 0, 1, 2, 3
ACTION_INDEX, STOP_INDEX = 0x80000000, 0x80000001
_WORD = 0xFFFFFFFF


def philox4x32(seed: int, index: int, position: int, step: int, sequence: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    counter = [value & _WORD for value in (index, position, step, sequence)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & _WORD,
            (left >> 32) ^ counter[3] ^ key[1],
            left & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return counter[0], counter[1], counter[2], counter[3]


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def uniform(word: int) -> float:
    """The float32 in (0, 1) that 32 random bits stand for: the bits as float32, times 2^-32, plus 2^-33."""
    value = _float32(word) * 2.0**-32 + 2.0**-33  # exact in float64
    return min(_float32(value), 1.0 - 2.0**-24)


def exponential(word: int) -> float:
    """Standard exponential draw, exact for the float32 uniform."""
    return -math.log1p(-uniform(word))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else math.inf


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + _exp(-x))


def _arrival(draw: float, utility: float) -> float:
    """Logarithm of the time draw * exp(-utility)."""
    return math.log(draw) - utility


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if math.isinf(high) else high + math.log1p(math.exp(low - high))


@dataclass
class _Draws:
    """The random numbers of one row in one step."""

    seed: int
    sequence: int
    step: int

    def word(self, index: int, position: int) -> int:
        return philox4x32(self.seed, index, position, self.step, self.sequence)[0]


def _argmax(score: dict[int, float]) -> int:
    known = {i: s for i, s in score.items() if not math.isnan(s)}
    return min(known, key=lambda i: (-known[i], i)) if known else min(score)


def _bernoulli(score: dict[int, float], draws: _Draws, temperature: float, scale: float) -> list[int]:
    chosen = []
    for i, s in score.items():
        probability = min(1.0, scale * _sigmoid(s / temperature)) if not math.isnan(s) else 0.0
        if uniform(draws.word(ACTION_INDEX, i)) < probability:
            chosen.append(i)
    return chosen


def _dpls(score: dict[int, float], draws: _Draws, temperature: float, stop_logit: float) -> list[int]:
    times = {
        i: _arrival(exponential(draws.word(ACTION_INDEX, i)), s / temperature)
        for i, s in score.items()
        if not math.isnan(s)
    }
    if not times:
        return [min(score)]
    order = sorted(times, key=lambda i: (times[i], i))
    stop = _arrival(exponential(draws.word(STOP_INDEX, 0)), stop_logit)
    end = _log_add(times[order[0]], stop)
    return order[:1] + [i for i in order[1:] if times[i] < end]


def _action(
    score: dict[int, float], mode: str, draws: _Draws, temperature: float, scale: float, stop_logit: float
) -> list[int]:
    """Positions to unmask, in the order of their ranks (all rank 0 unless ``mode`` is "dpls")."""
    if not score:
        return []
    if mode == "dpls":
        return _dpls(score, draws, temperature, stop_logit)
    if mode in ("bernoulli", "bernoulli-argmax"):
        chosen = _bernoulli(score, draws, temperature, scale)
    else:
        chosen = [i for i, s in score.items() if s > 0]
    if not chosen and mode in ("bernoulli-argmax", "greedy"):
        chosen = [_argmax(score)]
    return chosen


def _active(mask: list[bool], block_length: int) -> list[int]:
    """Masked positions of the first block that has any."""
    masked = [i for i, m in enumerate(mask) if m]
    return [i for i in masked if i // block_length == masked[0] // block_length]


def unmask_(
    tokens: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask: Tensor,
    allowed: Tensor,
    steps: Tensor,
    remaining: Tensor,
    block: Tensor,
    done: Tensor,
    status: Tensor,
    start: int,
    block_length: int,
    max_steps: int,
    mode: str = "select",
    eos: int | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    stop_logit: float = 0.0,
    seed: int | Tensor = 0,
    sequence: Tensor | None = None,
) -> Tensor:
    """Same arguments, effects and result as :func:`unmask.ops.unmask_`."""
    batch, length = mask.shape
    rank = torch.full((batch, length), -1, dtype=torch.int32, device=mask.device)
    for b in range(batch):
        if done[b]:
            continue
        may = [i for i in _active(mask[b].tolist(), block_length) if allowed[b, i]]
        who = b if sequence is None else int(sequence[b])
        draws = _Draws(int(seed), who, int(steps[b]))
        chosen = _action({i: float(score[b, i]) for i in may}, mode, draws, temperature, scale, stop_logit)
        if any(token[b, i] < 0 for i in chosen):
            status[b], done[b], allowed[b] = POISONED, True, False
            continue
        for n, i in enumerate(chosen):
            rank[b, i] = n if mode == "dpls" else 0
            tokens[b, start + i] = token[b, i]
            mask[b, i] = False
        steps[b] += 1
        row = tokens[b, start : start + length]
        masked = [i for i in range(length) if mask[b, i]]
        before_masks = row[: masked[0]] if masked else row
        if eos is not None and (before_masks == eos).any():
            for i in masked:
                row[i] = eos
                mask[b, i] = False
            masked = []
        if not masked:
            status[b], done[b] = COMPLETE, True
        elif steps[b] >= max_steps:
            status[b], done[b] = EXHAUSTED, True
        remaining[b] = len(masked)
        block[b] = masked[0] // block_length if masked else -(-length // block_length)
        allowed[b] = False
        if not done[b]:
            allowed[b, _active(mask[b].tolist(), block_length)] = True
    return rank
