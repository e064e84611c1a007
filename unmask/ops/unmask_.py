"""``unmask_``: draw every row's action, write its tokens, and advance the row's state, in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.ops import library  # noqa: F401  (registers the op)
from unmask.ops.random import seed_tensor

MODES = ("select", "bernoulli", "bernoulli-argmax", "greedy", "dpls")
"""In the order of ActionMode in csrc/ops/unmask.h."""

_DRAWING = ("bernoulli", "bernoulli-argmax", "dpls")


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
    """Unmask positions of a canvas and bring each row's state up to date, both in place.

    The buffer is positions ``start`` to ``start + L`` of the canvas. A row's active block is the first block of
    ``block_length`` buffer positions (the last may be shorter) that holds a mask; only its masked positions can be
    unmasked. A row that is done is left exactly as it is. The full contract is in ``csrc/ops/unmask.h``.

    Args:
        tokens: (B, T) int64 canvas; written. Rows may be strided.
        token: (B, L) int64, the token each position would get; negative means that its logits were undefined, and
            choosing it ends the row with status 3, unwritten.
        score: (B, L) float32 logits of the policy, or for ``mode="select"`` the decision itself (bool, or > 0).
        mask: (B, L) bool, still masked; written.
        allowed: (B, L) bool, masked and in the active block of a row not done; written. May be narrower on entry.
        steps: (B,) int64, forwards taken; written, + 1 for every row not done.
        remaining: (B,) int64, masks left; written.
        block: (B,) int64, active block, the number of blocks if there is none; written.
        done: (B,) bool; written.
        status: (B,) int32, 0 running, 1 complete, 2 out of steps, 3 undefined logits; written where a row ends.
        start: first canvas position of the buffer.
        block_length: 1 to L.
        max_steps: a row with masks left after that many steps ends with status 2.
        mode: how the action comes out of ``score``: "select" (decided already), "bernoulli" (each allowed position by
            itself with probability min(1, scale * sigmoid(score / temperature))), "bernoulli-argmax" (the same, but
            the highest score if nothing was drawn), "greedy" (score > 0, else the highest) or "dpls" (dynamic
            Plackett-Luce: in order, without replacement, until STOP is drawn; at least one).
        eos: end-of-sequence id, or None. A row in which one stands before all remaining masks is complete, and its
            remaining masks become ``eos``.
        temperature: > 0; scores are divided by it ("bernoulli", "bernoulli-argmax", "dpls").
        scale: >= 0; factor on the Bernoulli probabilities.
        stop_logit: utility of STOP in "dpls".
        seed: key of the draws: an int, or an int64 tensor of one element on the device of ``tokens``.
        sequence: (B,) int64 ids that key each row's draws; None is the row's index. With ids, a row's draws do not
            depend on which other rows are in the batch.

    Returns:
        rank (B, L) int32: -1 where nothing was unmasked, else 0; for "dpls" the order of the draw, 0, 1, 2, ...

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a wrong shape, device, layout or number.

    """
    _check_tensors(
        tokens, token, score, mode, (mask, allowed, steps, remaining, block, done, status), sequence=sequence
    )
    length = token.shape[1]
    _check_numbers(tokens.shape[1], length, start, block_length, max_steps, temperature, scale, stop_logit, eos)
    return torch.ops.unmask.unmask_(
        tokens,
        token.contiguous(),
        score.to(torch.float32).contiguous(),
        mask,
        allowed,
        steps,
        remaining,
        block,
        done,
        status,
        start,
        block_length,
        max_steps,
        MODES.index(mode),
        -1 if eos is None else eos,
        float(temperature),
        float(scale),
        float(stop_logit),
        seed_tensor(seed, tokens.device) if mode in _DRAWING else None,
        sequence,
    )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as tokens, got {tensor.device}")


def _check_tensors(
    tokens: Tensor, token: Tensor, score: Tensor, mode: str, state: tuple[Tensor, ...], sequence: Tensor | None
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    for name, tensor in (("tokens", tokens), ("token", token)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}")
    batch, length = tokens.shape[0], token.shape[1]
    if length < 1:
        raise ValueError(f"token: expected at least one position, got shape {tuple(token.shape)}")
    _check("tokens", tokens, tokens.shape, (torch.int64,), tokens)
    _check("token", token, (batch, length), (torch.int64,), tokens)
    score_dtypes = (torch.bool, torch.float32) if mode == "select" else (torch.float32,)
    _check("score", score, (batch, length), score_dtypes, tokens)
    if tokens.shape[1] > 1 and tokens.stride(1) != 1:
        raise ValueError(
            f"tokens: written in place, so its last dimension must be contiguous; strides {tokens.stride()}"
        )
    if batch > 1 and abs(tokens.stride(0)) < tokens.shape[1]:
        raise ValueError(f"tokens: written in place, so its rows must not overlap; strides {tokens.stride()}")
    expected = (
        ("mask", (batch, length), torch.bool),
        ("allowed", (batch, length), torch.bool),
        ("steps", (batch,), torch.int64),
        ("remaining", (batch,), torch.int64),
        ("block", (batch,), torch.int64),
        ("done", (batch,), torch.bool),
        ("status", (batch,), torch.int32),
    )
    for (name, shape, dtype), tensor in zip(expected, state, strict=True):
        _check(name, tensor, shape, (dtype,), tokens)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: written in place, so it must be contiguous; strides {tensor.stride()}")
    if sequence is not None:
        _check("sequence", sequence, (batch,), (torch.int64,), tokens)


def _check_numbers(
    width: int,
    length: int,
    start: int,
    block_length: int,
    max_steps: int,
    temperature: float,
    scale: float,
    stop_logit: float,
    eos: int | None,
) -> None:
    if not 0 <= start <= width - length:
        raise ValueError(f"start: expected 0 to {width - length} (canvas of {width}, buffer of {length}), got {start}")
    if not 1 <= block_length <= length:
        raise ValueError(f"block_length: expected 1 to {length}, got {block_length}")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    if not 0 < temperature <= 1e30:
        raise ValueError(f"temperature: expected a number > 0 and up to 1e30, got {temperature}")
    if not 0 <= scale <= 1e30:
        raise ValueError(f"scale: expected a number from 0 to 1e30, got {scale}")
    if not math.isfinite(stop_logit) or abs(stop_logit) > 1e30:
        raise ValueError(f"stop_logit: expected a finite number, got {stop_logit}")
    if eos is not None and eos < 0:
        raise ValueError(f"eos: expected a token id or None, got {eos}")


@torch.library.register_fake("unmask::unmask_")
def _fake(tokens: Tensor, token: Tensor, *_: object) -> Tensor:
    return token.new_empty(token.shape, dtype=torch.int32)
