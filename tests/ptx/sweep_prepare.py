"""Sweep of prepare against plain torch, bit for bit."""

from __future__ import annotations

from dataclasses import fields

from on_reference import plain_torch
from prepare_cases import random_problem, solved
from sweeping import Case, sweep

from unmask.ops import Prepared


def one(case: Case) -> None:
    r = case.random
    length = r.choice([1, 31, 32, 64, 256, r.randrange(1, 600)])
    state, asked = random_problem(r, case.generator, length)
    case.group = "edits" if asked["edits"] else "commits"
    case.text = f"batch {len(state.rows)}, length {length}, block {state.block_length}, {asked}"
    got = solved(state, asked)
    with plain_torch():
        want = solved(state, asked)
    for name in (f.name for f in fields(Prepared)):
        a, b = getattr(got, name), getattr(want, name)
        if a is not None or b is not None:
            case.equal(name, a, b)


sweep(one)
