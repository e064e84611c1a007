"""``choose``: what a hand-made rule, with its options, commits and revises in one step, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.ops import library

RULES = ("picked", "threshold", "factor", "cost-bound", "count", "fixed-steps", "block-steps", "near")
SCORES = ("probability", "margin", "cost", "draw", "place", "given")
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Choice:
    """A rule and options as :func:`choose` takes them; csrc/ops/choose.h has the formula of each."""

    rule: str = "picked"
    """One of ``RULES``."""
    score: str = "probability"
    """By which positions are ordered: one of ``SCORES``."""
    numbers: tuple[float, ...] = ()
    """At most 3; what they mean depends on the rule."""
    window: int | None = None
    """Only the first so many positions of the region are allowed."""
    decay: float = 0.0
    """Scores are multiplied by exp(-decay n) for the n-th position of the region, costs divided."""
    spacing: int = 1
    """Of two picked positions that are closer than this, the one of lower score is taken back."""
    hold_eos: bool = False
    """Whether ends of sequence wait until everything before them in the region is picked."""
    edit: float | None = None
    """Tokens are revised whose replacement is more probable; None: none."""


@dataclass(frozen=True)
class Proposed:
    """What is chosen from: B rows of a buffer of L positions."""

    region: Tensor
    """(B, L) bool: the masked positions of the active block."""
    probability: Tensor
    """(B, L) float32: of the candidate."""
    candidates: Tensor
    """(B, L) int64: the token that each position would get."""
    allowed: Tensor | None = None
    """(B, L) bool: where the region is narrowed; None: all of it."""
    values: Tensor | None = None
    """What the score is made of: (B, L) float32, for "margin" (B, L, K)."""
    picked: Tensor | None = None
    """(B, L) bool: the decision for "picked", a further condition for the other rules; None: none."""
    tokens: Tensor | None = None
    """(B, L) int64: the buffer; needed with ``editable``."""
    editable: Tensor | None = None
    """(B, L) bool: tokens that may be revised."""
    steps: Tensor | None = None
    """(B,) int64: forwards taken, for the schedules."""
    phase: Tensor | None = None
    """(B,) int64: where in a block the buffer begins; None: at its start."""
    memory: Tensor | None = None
    """(B, 2) int64, changed in place: what a schedule knows of the block; -1 at first."""
    block_length: int = 1
    horizon: int | None = None
    """Length of the completion; None: L."""
    stop_ids: Sequence[int] = ()
    """At most 16 ids that end a completion."""


def choose(choice: Choice, given: Proposed) -> tuple[Tensor, Tensor, Tensor | None]:
    """The positions to commit, each row by itself; nothing waits for the device.

    Returns:
        (B, L) bool, the positions picked: at least one wherever any is allowed. (B, L) float32, their score, -inf where
        not allowed. (B, L) bool, the positions to revise, None without ``choice.edit``.

    Raises:
        TypeError: a tensor of the wrong dtype, or one that the rule needs is missing.
        ValueError: a wrong shape, device or number; the message names the argument.
    """
    select, score, revise = library.call("choose", *arguments(choice, given))
    return select, score, None if choice.edit is None or given.editable is None else revise


def arguments(choice: Choice, given: Proposed) -> tuple[object, ...]:
    """The op's arguments, as its schema has them."""
    c, g = choice, given
    editable = None if c.edit is None else g.editable
    numbers = [float(x) for x in c.numbers] + [0.0] * (3 - len(c.numbers))
    tensors = (g.region, g.allowed, g.probability, g.candidates, g.values, g.picked, g.tokens, editable)
    rule = (RULES.index(c.rule), SCORES.index(c.score), numbers)
    where = (g.block_length, g.horizon or max(g.region.shape[-1], 1), list(g.stop_ids))
    window = NO_LIMIT if c.window is None else c.window
    options = (window, c.decay, c.spacing, c.hold_eos, 0.0 if c.edit is None else c.edit)
    return (*tensors, g.steps, g.phase, g.memory, *rule, *where, *options)


@torch.library.register_fake("unmask::choose")
def _fake(region: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    revised = region.shape if rest[6] is not None else (0, region.shape[1])
    return torch.empty_like(region), region.new_empty(region.shape, dtype=torch.float32), region.new_empty(revised)
