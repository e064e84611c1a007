"""Problems of ``calm_``, and how its results are compared with plain torch in float64."""

from __future__ import annotations

import random
from typing import Any

import torch
from on_reference import truth
from torch import Tensor

from unmask.ops import calm_

TOLERANCE = 2e-5
Problem = dict[str, Any]


def random_problem(r: random.Random, generator: torch.Generator, vocab: int) -> Problem:
    """Rows anywhere in their buffer and in any step; distributions that moved by nothing, little or much."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, length = r.randrange(1, 4), r.randrange(1, 9)
    blocks = r.random() < 0.6
    places = r.randrange(1, length + 3) if blocks else length
    before = drawn(batch, places, vocab) * r.choice([0.1, 1, 3, 6])
    now = before + drawn(batch, places, vocab) * r.choice([0, 1e-3, 0.1, 2]) + r.choice([0, 4])
    for logits in (before, now):
        logits[torch.rand(logits.shape, generator=generator) < r.choice([0, 0, 0.1])] = -torch.inf
        if r.random() < 0.2:
            logits[-1, -1, r.randrange(vocab)] = r.choice([torch.nan, torch.inf])
    dtype, wide = r.choice([torch.float32, torch.bfloat16, torch.float16]), r.randrange(3)
    first = torch.randint(1 - places, length + 1, (batch, 1), generator=generator)
    return {
        # Rows that do not follow each other begin at any address.
        "logits": torch.cat((now, drawn(batch, places, wide)), dim=-1).to(dtype)[..., :vocab],
        "previous": before.to(dtype),
        "calm_for": torch.randint(0, 5, (batch, length), generator=generator, dtype=torch.int32),
        "steps": torch.randint(0, 4, (batch,), generator=generator),
        "positions": (first + torch.arange(places)).clamp(0, length - 1) if blocks else None,
        "excluded": r.choice([-1, r.randrange(vocab), vocab - 1]),
        "bound": r.choice([1e-3, 0.02, 2.0, float("inf")]),
        "needed": r.randrange(4),
    }


def solved(problem: Problem, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The results and what was changed in place, of a copy of the problem on ``device``."""
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem.items()}
    there |= {name: there[name].clone() for name in ("previous", "calm_for")}
    calm, divergence = calm_(**there)
    found = {"calm": calm, "divergence": divergence, "previous": there["previous"], "calm_for": there["calm_for"]}
    return {name: value.cpu() for name, value in found.items()}


def wanted(problem: Problem) -> tuple[dict[str, Tensor], Tensor]:
    """The same in float64, and (B, L) bool where a divergence is not so near the bound that rounding decides."""
    want = truth(solved, problem)
    near = (want["divergence"] - problem["bound"]).abs() < TOLERANCE * max(1.0, problem["bound"])
    clear = torch.ones_like(want["calm"])
    rows, places = near.nonzero(as_tuple=True)
    clear[rows, places if problem["positions"] is None else problem["positions"][rows, places]] = False
    return want, clear


def assert_matches(problem: Problem, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    got, (want, clear) = solved(problem, device), wanted(problem)
    torch.testing.assert_close(
        got["divergence"], want["divergence"], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, check_dtype=False
    )
    assert torch.equal(got["previous"].nan_to_num(9e3), want["previous"].nan_to_num(9e3))
    for name in ("calm", "calm_for"):
        assert torch.equal(got[name][clear], want[name][clear]), name
    return got
