"""Sweep of choose against plain torch, bit for bit: every rule, score and option."""

from __future__ import annotations

from choose_cases import RULES, random_problem, run
from on_reference import plain_torch
from sweeping import Case, sweep


def one(case: Case) -> None:
    r = case.random
    case.group, length = r.choice(RULES), r.choice([1, 31, 32, 64, 256, r.randrange(1, 600)])
    choice, given = random_problem(case.group, r, case.generator, r.randrange(1, 6), length)
    case.text = f"length {length}, block {given.block_length}, {choice}"
    got = run(choice, given)
    with plain_torch():
        want = run(choice, given)
    for name, a, b in zip(("select", "score", "revise", "memory"), got, want, strict=True):
        if a is not None or b is not None:
            case.equal(name, a, b)


sweep(one)
