"""calm_: against plain torch in float64, that against sums written out, and the counts of calm steps by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from calm_cases import assert_matches, random_problem, solved

from unmask.ops import calm_


@pytest.mark.parametrize("vocab", [1, 3, 64, 511, 4099, 9000])
def test_against_float64(vocab: int, device: torch.device) -> None:
    r, generator, calm = random.Random(vocab), torch.Generator().manual_seed(vocab), 0
    for _ in range(30):
        calm += int(assert_matches(random_problem(r, generator, vocab), device)["calm"].sum())
    assert calm > 30


def test_divergence_of_a_real_vocabulary(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.randn(1, 2, 126_465, generator=torch.Generator().manual_seed(0)) * 3
        now = before + 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        problem = {
            "logits": now.to(dtype), "previous": before.to(dtype), "calm_for": torch.ones(1, 2, dtype=torch.int32),
            "steps": torch.ones(1, dtype=torch.int64), "positions": None, "excluded": 5, "bound": 0.02, "needed": 1,
        }  # fmt: skip
        divergence = assert_matches(problem, device)["divergence"]
        assert 0.03 < divergence.min() < divergence.max() < 0.06  # half the noise's variance


def test_by_hand(device: torch.device) -> None:
    """KL((0.9, 0.1) || (0.5, 0.5)) without the third token; the second row is in its first step."""
    now, before = torch.tensor([0.9, 0.1, 5.0]).log(), torch.tensor([0.5, 0.5, 7.0]).log()
    want = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    problem: dict[str, Any] = {
        "logits": now.expand(2, 3, 3), "previous": before.expand(2, 3, 3),
        "calm_for": torch.tensor([[9, 2, 1, 0, 9]] * 2, dtype=torch.int32), "steps": torch.tensor([3, 0]),
        "positions": torch.tensor([[1, 2, 3]] * 2), "excluded": 2, "bound": want + 1e-4, "needed": 2,
    }  # fmt: skip
    got = solved(problem, device)
    assert got["divergence"][0].tolist() == [pytest.approx(want, abs=1e-6)] * 2 + [math.inf]
    assert got["divergence"][1].tolist() == [math.inf] * 3
    assert got["calm_for"].tolist() == [[0, 3, 2, 1, 0], [0, 1, 1, 1, 0]]
    assert got["calm"].tolist() == [[False, True, False, False, False], [False] * 5]
    assert torch.equal(got["previous"], problem["logits"])
    got = solved({**problem, "bound": want - 1e-4}, device)
    assert got["calm_for"][0].tolist() == [0, 1, 1, 1, 0]


def test_positions_that_repeat_or_lie_outside(device: torch.device) -> None:
    """At the buffer's ends the block's positions repeat; the first place of a position counts."""
    problem: dict[str, Any] = {
        "logits": torch.zeros(1, 5, 2), "previous": torch.ones(1, 5, 2),
        "calm_for": torch.tensor([[1, 1]], dtype=torch.int32), "steps": torch.tensor([1]),
        "positions": torch.tensor([[0, 0, 1, 1, 7]]), "bound": 0.1, "needed": 1,
    }  # fmt: skip
    got = solved(problem, device)
    assert got["calm_for"].tolist() == [[2, 2]]
    assert got["divergence"].isinf().tolist() == [[False, True, False, True, True]]
    assert got["previous"][0, :, 0].tolist() == [0, 1, 0, 1, 1]


GOOD: dict[str, Any] = {
    "logits": torch.zeros(2, 3, 4), "previous": torch.zeros(2, 3, 4), "steps": torch.ones(2, dtype=torch.int64),
    "calm_for": torch.zeros(2, 3, dtype=torch.int32), "positions": None, "bound": 1.0, "needed": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4).double()}, TypeError, "logits: expected float32, bfloat16 or float16"),
        ({"logits": torch.zeros(2, 3)}, ValueError, r"logits: expected shape \(B, S, V\) .*got \(2, 3\)"),
        ({"logits": torch.zeros(2, 2, 4)}, ValueError, "logits: expected all L positions, or positions"),
        ({"previous": torch.zeros(2, 3, 4).half()}, TypeError, "previous: expected float32, got float16"),
        ({"previous": torch.zeros(2, 3, 5)}, ValueError, r"previous: expected shape \(2, 3, 4\), got \(2, 3, 5\)"),
        ({"previous": torch.zeros(2, 4, 3).mT}, ValueError, "previous: expected a contiguous tensor"),
        ({"calm_for": torch.zeros(2, 3)}, TypeError, "calm_for: expected int32, got float32"),
        ({"calm_for": torch.zeros(3, 2, dtype=torch.int32).T}, ValueError, "calm_for: expected a contiguous tensor"),
        ({"steps": torch.ones(3, dtype=torch.int64)}, ValueError, r"steps: expected shape \(2,\), got \(3,\)"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"positions: expected shape \(2, 3\)"),
        ({"needed": -1}, ValueError, "needed: expected at least 0, got -1"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], error: type[Exception], message: str, device: torch.device) -> None:
    with pytest.raises(error, match=message):
        calm_(**{**GOOD, **change})
    assert not calm_(**{**GOOD, "calm_for": torch.zeros(2, 3, dtype=torch.int32)})[0].any()


def test_opcheck(kernels: torch.device) -> None:
    for blocks in (False, True):
        there = {n: v.to(kernels) if isinstance(v, torch.Tensor) else v for n, v in GOOD.items()}
        there["positions"] = torch.arange(3, device=kernels).expand(2, 3) if blocks else None
        arguments = (*(there[n] for n in ("logits", "previous", "calm_for", "steps", "positions")), 1, 0.5, 2)
        torch.library.opcheck(torch.ops.unmask.calm_.default, arguments)
