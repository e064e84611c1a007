"""Problems of ``prepare``, and both ways of solving them."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import torch
from on_reference import plain_torch
from torch import Tensor
from unmask_cases import moved, random_state

from unmask.ops import Prepared, State, prepare


def random_problem(r: random.Random, generator: torch.Generator, length: int) -> tuple[State, dict[str, Any]]:
    """Rows of all statuses and with any columns, some of them finished."""
    batch, block_length = r.randrange(1, 6), r.choice([1, 4, 32, r.randrange(1, length + 3)])
    state = random_state(
        generator, batch, r.randrange(3), length, block_length, r.choice([0.0, 0.4, 1.0]), r.randrange(2)
    )
    state.steps.copy_(torch.randint(0, 90, (batch,), generator=generator))
    state.forwards.copy_(torch.randint(0, 2**40, (batch,), generator=generator))
    state.draw_step.copy_(torch.randint(0, r.choice([1, 99, 2**40]), (batch,), generator=generator))
    state.status.copy_(torch.randint(0, 4, (batch,), generator=generator))
    editable = torch.rand(batch, length, generator=generator) < 0.7
    seed = torch.randint(-(2**62), 2**62, (1,), generator=generator)
    asked = {"edits": r.random() < 0.6, "everywhere": r.random() < 0.4, "seed": r.choice([None, seed])}
    return replace(state, editable=editable), {"horizon": r.choice([length, 3 * length]), **asked}


def solved(state: State, asked: dict[str, Any], device: torch.device | str = "cpu") -> Prepared:
    there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in asked.items()}
    return prepare(moved(state, device), **there)


def assert_equals_plain_torch(state: State, asked: dict[str, Any], device: torch.device | str = "cpu") -> Prepared:
    got = solved(state, asked, device)
    with plain_torch():
        want = solved(state, asked)
    for name in (f.name for f in fields(Prepared)):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None and b is None) or torch.equal(a.cpu(), b), name
    return got
