"""choose: every rule and option against plain torch, bit by bit, and rows that do not see each other.

The rules themselves are tested where users meet them: tests/policies/test_heuristics.py and test_options.py.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch
from choose_cases import RULES, Chosen, random_problem, run
from on_reference import plain_torch
from torch import Tensor

from unmask.ops import Choice, Proposed, choose


def same(got: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...]) -> None:
    for name, a, b in zip(("select", "score", "revise", "memory"), got, want, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or b is None or torch.equal(a.cpu(), b.cpu()), name


def plain(choice: Choice, given: Proposed) -> Chosen:
    with plain_torch():
        return run(choice, given)


def on(given: Proposed, device: torch.device) -> Proposed:
    moved = {f.name: getattr(given, f.name) for f in fields(given)}
    return Proposed(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in moved.items()})


@pytest.mark.parametrize("rule", RULES)
def test_equals_plain_torch(rule: str, device: torch.device) -> None:
    r, g, picked = random.Random(rule), torch.Generator().manual_seed(3), 0
    for _ in range(40):
        choice, given = random_problem(rule, r, g, r.choice([1, 3, 7]), r.choice([1, 9, 33, 200, 300]))
        got, want = run(choice, on(given, device)), plain(choice, given)
        same(got, want)
        allowed = want[1] > float("-inf")
        assert torch.equal(want[0].any(1), allowed.any(1)), "a row with a choice commits something"
        assert not (want[0] & ~allowed).any()
        picked += int(want[0].sum())
    assert picked > 100


@pytest.mark.parametrize("rule", ["threshold", "factor", "fixed-steps"])
def test_rows_do_not_see_each_other(rule: str, device: torch.device) -> None:
    r, g = random.Random(1), torch.Generator().manual_seed(1)
    choice, given = random_problem(rule, r, g, 6, 40)
    whole = run(choice, on(given, device))
    for b in range(6):
        parts = {f.name: getattr(given, f.name) for f in fields(given)}
        row = Proposed(**{n: v[b : b + 1] if isinstance(v, Tensor) else v for n, v in parts.items()})
        same(run(choice, on(row, device)), tuple(None if t is None else t[b : b + 1] for t in whole))


def test_what_it_refuses() -> None:
    good = Proposed(torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    rule = Choice("threshold", numbers=(0.5,))
    for choice, given, error, message in (
        (Choice("picked"), good, TypeError, "picked: expected"),
        (Choice("threshold", "cost", (0.5,)), good, TypeError, "values: expected"),
        (replace(rule, window=0), good, ValueError, "window: expected at least 1, got 0"),
        (rule, replace(good, candidates=good.region), TypeError, "candidates: expected int64"),
        (rule, replace(good, probability=torch.rand(2, 4)), ValueError, "probability: "),
    ):  # fmt: skip
        for way in (choose, plain):
            with pytest.raises(error, match=message):
                way(choice, given)
