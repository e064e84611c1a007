"""Rules with a number of steps per block, against a loop that is written out."""

from __future__ import annotations

import pytest
import torch

from unmask.policies import make_policy
from unmask.policies.base import Observation

LENGTH, BLOCK = 16, 8


def written_out(
    confidence: list[list[float]], steps: int, bound: float, sequential: bool, phase: int
) -> list[set[int]]:
    """What SDAR's loop takes of one row in each step, given the confidences of every step."""
    taken: set[int] = set()
    order: list[set[int]] = []
    done_in_block: dict[int, int] = {}
    while len(taken) < LENGTH:
        block = min((i + phase) // BLOCK for i in range(LENGTH) if i not in taken)
        left = [i for i in range(LENGTH) if i not in taken and (i + phase) // BLOCK == block]
        s = done_in_block.get(block, 0)
        done_in_block[block] = s + 1
        least = max(1, BLOCK // steps + (s < BLOCK % steps))
        now = confidence[len(order)]
        ranked = left if sequential else sorted(left, key=lambda i: -now[i])
        sure = {i for i in left if now[i] > bound}
        chosen = sure if not sequential and len(sure) >= min(least, len(left)) else set(ranked[:least])
        order.append(chosen)
        taken |= chosen
    return order


@pytest.mark.parametrize("spec", ["block-steps:3", "block-steps:5,0.8", "block-steps:12,0.5", "sequential:3"])
def test_a_block_takes_its_steps(spec: str) -> None:
    """Rows at different phases in one batch, step for step."""
    name, _, numbers = spec.partition(":")
    steps, _, bound = numbers.partition(",")
    phases = [0, 3, 7]
    confidence = torch.rand(40, 3, LENGTH, generator=torch.Generator().manual_seed(0))
    policy, memory = make_policy(spec), {}
    mask, count = torch.ones(3, LENGTH, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    expected = [
        written_out(confidence[:, r].tolist(), int(steps), float(bound or 1), name == "sequential", phase)
        for r, phase in enumerate(phases)
    ]
    blocks = (torch.arange(LENGTH) + torch.tensor(phases)[:, None]) // BLOCK
    for step in range(max(map(len, expected))):
        active = torch.where(mask, blocks, 99).amin(1)
        now = confidence[step]
        seen = Observation(
            mask=mask.clone(), allowed=mask & (blocks == active[:, None]), confidence=now[..., None],
            candidates=torch.zeros(3, LENGTH, dtype=torch.int64), token_confidence=now, steps=count.clone(),
            length=LENGTH, block_length=BLOCK, phase=torch.tensor(phases), memory=memory,
        )  # fmt: skip
        select = policy.decide(seen).select
        assert select is not None
        for row, order in enumerate(expected):
            assert set(select[row].nonzero().flatten().tolist()) == (order[step] if step < len(order) else set())
        mask &= ~select
        count += select.any(1)


def test_threshold_takes_at_least_so_many() -> None:
    now = torch.tensor([[0.9, 0.2, 0.7, 0.95, 0.1], [0.3, 0.2, 0.1, 0.4, 0.5]])
    allowed = torch.tensor([[True] * 5, [True, False, False, True, False]])
    seen = Observation(
        mask=allowed, allowed=allowed, confidence=now[..., None], candidates=torch.zeros(2, 5, dtype=torch.int64),
        token_confidence=now, steps=torch.zeros(2, dtype=torch.int64), length=5, block_length=5,
    )  # fmt: skip
    picks = {spec: make_policy(spec).decide(seen).select for spec in ("threshold:0.8", "threshold:0.8,3")}
    assert picks["threshold:0.8"].tolist() == [[True, False, False, True, False], [False, False, False, True, False]]
    assert picks["threshold:0.8,3"].tolist() == [[True, False, True, True, False], [True, False, False, True, False]]
    assert [make_policy(spec).spec for spec in picks] == ["threshold:0.8", "threshold:0.8,3"]
