"""Recorded decodings: observations and actions of every step, enough to replay the policy without the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampling.loop import StepRecord
from unmask.sampling.state import State


@dataclass(repr=False)
class Trajectory:
    """Observations and actions of N rows over S steps, the most that a row took; each row counts its own steps."""

    mask: Tensor
    """(N, S, L) bool: masked before the step."""
    allowed: Tensor
    """(N, S, L) bool."""
    confidence: Tensor
    """(N, S, L, k) float32: the largest probabilities, of which the first is that of the token drawn."""
    candidates: Tensor
    """(N, S, L) int64: the token that each position would have got, where it was read."""
    rank: Tensor
    """(N, S, L) int32: 0 where a token was unmasked, or for "dpls" the order of the draw;
    :data:`unmask.ops.unmask_.REVISED` where one was revised; else -1."""
    active: Tensor
    """(N, S) bool: the row took this step."""
    phase: Tensor | None = None
    """(N,) int64: where in a block the buffer begins; None: at its start."""
    horizon: int = 0
    """Tokens of the whole completion, the unit of time; 0: L."""
    missing: Tensor | None = None
    """(N,) int64: positions on the left that a row, a shorter text with holes, does not have; None: it has all."""

    def __repr__(self) -> str:
        rows, steps, length = self.mask.shape
        return f"Trajectory({rows} rows, at most {steps} steps, {length} positions, {int(self.actions.sum())} commits)"

    @property
    def actions(self) -> Tensor:
        """(N, S, L) bool: unmasked at the step."""
        return self.rank >= 0

    @property
    def time(self) -> Tensor:
        """(S,) float32: steps taken before, divided by the tokens of the completion, at most 1.

        Texts with holes of several lengths (``missing``) have times of their own: steps divided by their length.
        """
        count, length = self.mask.shape[1:]
        steps = torch.arange(count, device=self.mask.device, dtype=torch.float32)
        return (steps / (self.horizon or length)).clamp_max(1.0)


class Recorder:
    """Collects the steps of a changing batch and arranges them by row and step."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, ...]] = []

    def follow(self, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """Yield ``records``, of a generation with ``SamplerConfig(record=True)``, and keep each."""
        for record in records:
            o = record.observation
            # Where tokens may be revised, forwards without masks count as well. A seed is no action of the policy.
            edits = o.editable is not None
            took, steps = (record.changed, record.state.forwards - 1) if edits else (record.took, o.steps)
            self._steps.append((record.rows, took, steps, o.mask, o.allowed, o.drawn, o.candidates, record.rank))
            yield record

    def trajectory(self, state: State, num_confidences: int) -> Trajectory:
        """The trajectory so far of all rows of ``state``."""
        num_rows = state.rows.shape[0]
        if not self._steps:
            return empty(num_rows, 0, state.length, num_confidences, state.rows.device)
        rows, took, steps, mask, allowed, confidence, candidates, rank = (
            torch.cat(parts) for parts in zip(*self._steps, strict=True)
        )
        rows, steps = rows[took], steps[took]
        count = int(steps.max()) + 1 if steps.numel() else 0

        def lay_out(values: Tensor, fill: float) -> Tensor:
            out = values.new_full((num_rows, count, *values.shape[1:]), fill)
            out[rows, steps] = values[took]
            return out

        return Trajectory(
            mask=lay_out(mask, False),
            allowed=lay_out(allowed, False),
            confidence=lay_out(confidence, 0.0),
            candidates=lay_out(candidates, 0),
            rank=lay_out(rank, -1),
            active=lay_out(took, False),
            phase=state.phase.clone() if state.grid else None,
            horizon=state.horizon,
        )


def empty(rows: int, steps: int, length: int, num_confidences: int, device: torch.device) -> Trajectory:
    """A trajectory without active steps."""
    mask = torch.zeros((rows, steps, length), dtype=torch.bool, device=device)
    return Trajectory(
        mask=mask,
        allowed=mask.clone(),
        confidence=torch.zeros((rows, steps, length, num_confidences), dtype=torch.float32, device=device),
        candidates=torch.zeros((rows, steps, length), dtype=torch.int64, device=device),
        rank=torch.full((rows, steps, length), -1, dtype=torch.int32, device=device),
        active=torch.zeros((rows, steps), dtype=torch.bool, device=device),
    )


def join(parts: Sequence[tuple[Tensor, int, Trajectory]], num_rows: int, length: int) -> Trajectory:
    """Merge ``parts`` (rows, positions missing on the left, trajectory) into one trajectory of all rows."""
    first = parts[0][2]
    steps = max(part.mask.shape[1] for _, _, part in parts)
    whole = empty(num_rows, steps, length, first.confidence.shape[-1], first.mask.device)
    whole.missing = torch.full((num_rows,), length, device=first.mask.device)
    for rows, missing, part in parts:
        whole.missing[rows] = missing
        count = part.mask.shape[1]
        for name in ("mask", "allowed", "confidence", "candidates", "rank", "active"):
            target, value = getattr(whole, name), getattr(part, name)
            if name == "active":
                target[rows, :count] = value
            else:
                target[rows, :count, missing:] = value
    return whole
