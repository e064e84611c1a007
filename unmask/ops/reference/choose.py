"""``choose`` in plain torch, by the contract of csrc/ops/choose.h, for all rows at once; ties go to the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.ops.choose import RULES, SCORES
from unmask.ops.library import fallback
from unmask.ops.reference.checks import check, check_tensors, wide_dtype

FEW_ROUNDS = 16
"""So many rounds of :func:`independent` take less time than looking whether anything still changes."""
MOST_DECAY = 80.0
"""exp(-80) is a normal float32; scores further back are all multiplied by it."""


@fallback
def choose(
    region: Tensor,
    allowed: Tensor | None,
    probability: Tensor,
    candidates: Tensor,
    values: Tensor | None,
    picked: Tensor | None,
    tokens: Tensor | None,
    editable: Tensor | None,
    steps: Tensor | None,
    phase: Tensor | None,
    memory: Tensor | None,
    rule: int,
    score: int,
    numbers: Sequence[float],
    block_length: int,
    horizon: int,
    stops: Sequence[int],
    window: int,
    decay: float,
    spacing: int,
    hold_eos: bool,
    edit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result of the op."""
    name, kind = _named(rule, score, block_length=block_length, horizon=horizon, window=window, spacing=spacing)
    reads, counts = kind not in ("probability", "place"), name in ("fixed-steps", "block-steps")
    check(region.ndim == 2, "region", "shape (B, L)", tuple(region.shape))
    needed = {"memory": (counts, memory), "steps": (counts, steps), "values": (reads, values)}
    _check_given(f"{name!r} by {kind!r}", needed | {"picked": (name == "picked", picked)})
    check_tensors(
        {"2": 2},
        region,
        region=(region, torch.bool, "BL"),
        allowed=(allowed, torch.bool, "BL"),
        probability=(probability, torch.float32, "BL"),
        candidates=(candidates, torch.int64, "BL"),
        values=(values if reads else None, torch.float32, "BLK" if kind == "margin" else "BL"),
        picked=(picked, torch.bool, "BL"),
        tokens=(tokens, torch.int64, "BL"),
        editable=(editable, torch.bool, "BL"),
        steps=(steps if counts else None, torch.int64, "B"),
        phase=(phase, torch.int64, "B"),
        memory=(memory if counts else None, torch.int64, "B2"),
    )
    rank = region.cumsum(dim=1) - 1
    narrowed = region & (rank < window) if allowed is None else region & (rank < window) & allowed
    factor = log_decay(rank, decay).exp().float() if decay else None
    order = comparable(scores(kind, probability, values, factor, rank), narrowed)
    if name == "picked":
        chosen = narrowed
    else:
        quota = _quota(name, region, numbers, steps, phase, memory if counts else None, block_length, horizon)
        chosen = _by_rule(name, order, numbers, quota) & usable(order)
    chosen = chosen if picked is None else chosen & picked
    select = kept(region, narrowed, order, chosen, candidates, stops, spacing, hold_eos)
    if editable is None:
        return select, order, region.new_empty((0, region.shape[1]))
    return select, order, revisions(editable, candidates, tokens, probability, edit)


def _named(rule: int, score: int, **sizes: int) -> tuple[str, str]:
    """The names of ``rule`` and ``score``; ValueError for a number that has none, or for ``sizes`` below 1."""
    check(0 <= rule < len(RULES), "rule", f"0 to {len(RULES) - 1}", rule)
    check(0 <= score < len(SCORES), "score", f"0 to {len(SCORES) - 1}", score)
    for what, size in sizes.items():
        check(size >= 1, what, "at least 1", size)
    return RULES[rule], SCORES[score]


def _check_given(rule: str, tensors: dict[str, tuple[bool, Tensor | None]]) -> None:
    """TypeError for the first tensor that the rule needs and that is None."""
    for name, (needed, tensor) in tensors.items():
        if needed and tensor is None:
            raise TypeError(f"{name}: expected a tensor for {rule}, got None")


def scores(kind: str, probability: Tensor, values: Tensor | None, factor: Tensor | None, rank: Tensor) -> Tensor:
    """(B, L) float32: the scores of all positions, NaN where they are undefined."""
    if kind == "place":
        return -rank.to(torch.float32)
    if kind == "probability" or values is None:
        return probability if factor is None else probability * factor
    if kind == "margin":
        values = values[..., 0] - values[..., 1]
    if kind == "cost":
        return -values if factor is None else -(values / factor)
    return values if factor is None or kind == "given" else values * factor


def log_decay(rank: Tensor, decay: float) -> Tensor:
    """(B, L): logarithm of the factor on the scores of positions of this ``rank``; its exp rounds as float64's does."""
    return (-decay * rank.to(torch.float32)).clamp_min(-MOST_DECAY).to(wide_dtype(rank.device))


def revisions(
    editable: Tensor | None, candidates: Tensor, tokens: Tensor | None, probability: Tensor, edit: float | None
) -> Tensor:
    """(B, L) bool: the tokens that are revised."""
    assert editable is not None
    assert tokens is not None
    assert edit is not None
    return editable & (candidates != tokens) & (probability > edit)


def kept(
    region: Tensor,
    allowed: Tensor,
    score: Tensor,
    chosen: Tensor,
    candidates: Tensor,
    stops: Sequence[int],
    spacing: int,
    hold_eos: bool,
) -> Tensor:
    """(B, L) bool: what remains of ``chosen`` under the options, or the best position that they leave."""
    if spacing > 1:
        index = torch.arange(region.shape[1], device=region.device)
        close = (index[:, None] - index).abs() < spacing
        chosen = independent(chosen, score, close, region.shape[1])
    if hold_eos:
        ends = torch.zeros_like(region)
        for stop in stops:  # without a tensor of the ids, which a captured graph could not make
            ends |= candidates == stop
        chosen = chosen & (~ends | ((region & ~chosen).cumsum(dim=1) == 0))
        allowed = allowed & (~ends | (region.cumsum(dim=1) == 1))
    return chosen | (best(comparable(score, allowed)) & allowed & ~chosen.any(dim=1, keepdim=True))


def _by_rule(name: str, score: Tensor, numbers: Sequence[float], quota: Tensor) -> Tensor:
    """(B, L) bool: what the rule picks by ``score``, which is -inf where not allowed; ``quota`` (B,) if it counts."""
    x, y, z = numbers
    if name == "threshold":
        sure = score > x
        few = sure.sum(dim=1, keepdim=True) < y
        return sure if y <= 1 else torch.where(few, top(score, torch.full_like(quota, int(y))), sure)
    if name == "factor":
        values, order = descending(score)
        n = torch.arange(1, score.shape[1] + 1, device=score.device, dtype=wide_dtype(score.device))
        holds = values >= (1.0 - x / (n + 1.0)).to(score.dtype)
        return unsort(holds.to(torch.uint8).cumprod(dim=1).bool(), order)
    if name == "cost-bound":
        values, order = descending(score)
        cost = (-values).clamp_min(0.0).to(wide_dtype(score.device))
        # Costs ascend, so the largest of a prefix is its last; the bound is on the sum of those before it.
        return unsort(F.pad(cost.cumsum(dim=1)[:, :-1], (1, 0)) <= x, order)
    if name == "near":
        anchors, radius = score >= x, min(int(z), score.shape[1])
        near = F.max_pool1d(anchors[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
        return anchors | (near & (score >= y))
    first = top(score, quota) & usable(score)
    if name != "block-steps":
        return first
    sure = score > y
    return torch.where((sure.sum(1) >= first.sum(1))[:, None], sure, first)


def _quota(
    name: str,
    region: Tensor,
    numbers: Sequence[float],
    steps: Tensor | None,
    phase: Tensor | None,
    memory: Tensor | None,
    block_length: int,
    horizon: int,
) -> Tensor:
    """(B,) int64: how many positions each row commits, if the rule counts; the memory is brought up to date."""
    left = region.sum(dim=1)
    total = int(numbers[0])
    if memory is None or steps is None:
        return torch.full_like(left, total)
    shift: int | Tensor = 0 if phase is None else phase
    block = (region.to(torch.uint8).argmax(dim=1) + shift) // block_length  # of the first masked position
    known = (memory[:, 0] == block) & (steps > 0)
    begun = torch.where(known, memory[:, 1], left if name == "fixed-steps" else steps)
    memory.copy_(torch.stack((block, begun), dim=1))  # in place, because a captured graph reads and writes it
    if name == "block-steps":
        longer = steps - begun < block_length % total
        return (block_length // total + longer.long()).clamp_min(1)
    num_blocks = (min(region.shape[1], horizon) + shift + block_length - 1) // block_length
    block_steps = (total // num_blocks + (block < total % num_blocks).long()).clamp_min(1)
    share, rest = begun // block_steps, begun % block_steps
    return share + (begun - left < rest * (share + 1)).long()


def comparable(score: Tensor, allowed: Tensor) -> Tensor:
    """``score`` (B, L) with -inf where not ``allowed``, and the lowest finite number where it is NaN.

    So :func:`best` finds an allowed position if there is one, and a NaN only when no other is left.
    """
    lowest = torch.finfo(score.dtype).min
    return torch.where(allowed, torch.nan_to_num(score, nan=lowest, posinf=None, neginf=lowest), float("-inf"))


def usable(score: Tensor) -> Tensor:
    """(B, L) bool: allowed and defined, for a score from :func:`comparable`."""
    return score > torch.finfo(score.dtype).min


def best(score: Tensor) -> Tensor:
    """(B, L) bool: the highest score of each row, the lowest position among equals."""
    positions = torch.arange(score.shape[1], device=score.device)
    return positions == score.argmax(dim=1, keepdim=True)


def descending(score: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, L) sorted from the highest, and their positions; equals keep their order."""
    return torch.sort(score, dim=1, descending=True, stable=True)


def unsort(chosen: Tensor, order: Tensor) -> Tensor:
    """Return ``chosen`` (B, L) bool from sorted order to its positions."""
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def top(score: Tensor, count: Tensor) -> Tensor:
    """(B, L) bool: the ``count`` (B,) highest scores of each row."""
    _, order = descending(score)
    positions = torch.arange(score.shape[1], device=score.device)
    return unsort(positions < count[:, None], order)


def independent(chosen: Tensor, score: Tensor, conflict: Tensor, rounds: int) -> Tensor:
    """(B, L) bool: of ``chosen``, from the highest score on, each that has no conflict with one taken before.

    ``conflict`` (1 or B, L, L) bool is symmetric; its diagonal does not count. ``rounds`` bounds how many positions of
    a row are chosen: after n rounds the first n of them are decided. All are run unless they are many and on the CPU,
    so nothing waits for a device.
    """
    score, index = comparable(score, chosen), torch.arange(score.shape[1], device=score.device)
    high, low = score[:, :, None], score[:, None, :]
    ahead = (high > low) | ((high == low) & (index[:, None] < index))
    blocks = (ahead & conflict & chosen[:, :, None]).transpose(1, 2).to(torch.float32)  # (B, L, L): of row by column
    taken = chosen
    for _ in range(rounds):
        before, taken = taken, chosen & ~(torch.bmm(blocks, taken[..., None].float())[..., 0] > 0)
        if rounds > FEW_ROUNDS and chosen.device.type == "cpu" and taken.equal(before):
            break
    return taken
