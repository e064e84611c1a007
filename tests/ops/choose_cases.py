"""Random problems of ``choose``: every rule, score and option, with ties, undefined numbers and rows without choice."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from unmask.ops import Choice, Proposed, choose
from unmask.ops.choose import RULES, SCORES

Chosen = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def random_problem(rule: str, r: random.Random, g: torch.Generator, batch: int, length: int) -> tuple[Choice, Proposed]:
    """A problem of ``rule``; probabilities are coarse, so that there are ties."""

    def coarse(*shape: int) -> Tensor:
        x = (torch.rand(*shape, generator=g) * 20).round() / 20
        return x.masked_fill(torch.rand(*shape, generator=g) < 0.03, float("nan"))

    def flags(share: float) -> Tensor:
        return torch.rand(batch, length, generator=g) < share

    block = r.choice([length, 1 + r.randrange(length), 8])
    steps = torch.randint(0, 3, (batch,), generator=g)
    numbers = {
        "picked": (), "threshold": (r.choice([0.3, 0.9]), r.choice([1, 3])), "factor": (r.choice([0.3, 1.0]),),
        "cost-bound": (r.choice([0.0, 0.4, 5.0]),), "count": (r.choice([1, 4, 300]),),
        "fixed-steps": (r.choice([1, 7, 64]),), "block-steps": (r.choice([1, 5, 64]), r.choice([0.5, 1.0])),
        "near": (r.choice([0.7, 0.95]), 0.3, r.choice([0, 2, 500])),
    }[rule]  # fmt: skip
    score = r.choice(SCORES)
    kept = Proposed(
        region=flags(r.choice([0.2, 0.8, 1.0])) & (torch.rand(batch, 1, generator=g) < 0.9),
        probability=coarse(batch, length),
        candidates=torch.randint(0, 9, (batch, length), generator=g),
        allowed=flags(0.7) if r.random() < 0.2 else None,
        values=coarse(batch, length, 3) if score == "margin" else coarse(batch, length),
        picked=flags(0.5) if rule == "picked" or r.random() < 0.2 else None,
        tokens=torch.randint(0, 9, (batch, length + 3), generator=g)[:, 3:],
        editable=flags(0.3),
        steps=steps,
        phase=torch.randint(0, block, (batch,), generator=g) if r.random() < 0.3 else None,
        memory=torch.stack((torch.randint(-1, 3, (batch,), generator=g), torch.zeros_like(steps)), dim=1),
        block_length=block,
        horizon=r.choice([None, length + 5]),
        stop_ids=(2, 7),
    )
    options = {
        "window": r.choice([None, None, 1, 5]),
        "decay": r.choice([0.0, 0.0, 0.1, 30.0]),
        "spacing": r.choice([1, 1, 2, 6]),
        "hold_eos": r.random() < 0.4,
        "edit": r.choice([None, 0.4]),
    }
    return Choice(rule, score, numbers, **options), kept


def run(choice: Choice, given: Proposed) -> Chosen:
    """The op's results, and the memory after it, which is a copy."""
    memory = None if given.memory is None else given.memory.clone()
    return (*choose(choice, replace(given, memory=memory)), memory)


__all__ = ["RULES", "Chosen", "random_problem", "run"]
