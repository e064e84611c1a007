"""``unmask_`` that revises tokens: against its rules written out for one row, and hand-worked rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from unmask_cases import MASK, assert_same, many_rows, moved, one_row, random_state, run

from unmask.ops import State, unmask_
from unmask.ops.state import COMPLETE, EXHAUSTED, POISONED, RUNNING

M = MASK


@dataclass
class Row:
    """One row of a state, in lists, and its step by the rules of csrc/ops/unmask.h."""

    tokens: list[int]
    mask: list[bool]
    allowed: list[bool]
    editable: list[bool]
    numbers: list[int]
    block_length: int

    def block(self, i: int) -> int:
        return (i + self.numbers[7]) // self.block_length

    def step(
        self,
        choice: tuple[list[int], list[bool], list[bool]],
        max_steps: int,
        eos: tuple[int, ...],
        max_post: int | None,
        everywhere: bool,
        settled_stop: bool,
    ) -> list[int]:
        """Changes the row; returns its ranks. ``choice``: candidates, select, revise."""
        candidates, select, revise = choice
        here = range(len(self.tokens))
        rank = [-1 for _ in here]
        steps, _, before, status, *_, forwards, post = self.numbers
        if status != RUNNING:
            return rank
        last = self.block(len(self.tokens) - 1) + 1
        masked = [self.block(i) for i in here if self.mask[i]]
        active = min([last, *masked] if max_post is None else [before, *masked])
        had_mask = max_post is None or active in masked
        for i in here:
            if self.mask[i] and self.allowed[i] and select[i] and self.block(i) == active:
                rank[i] = 0
            reached = self.block(i) == active or (everywhere and self.block(i) < active)
            if revise[i] and self.editable[i] and not self.mask[i] and reached and self.tokens[i] != candidates[i]:
                rank[i] = -2
        written = [i for i in here if rank[i] != -1]
        if any(candidates[i] < 0 for i in written):
            self.numbers[3], self.allowed = POISONED, [False for _ in here]
            return [-1 for _ in here]
        for i in written:
            self.tokens[i], self.mask[i] = candidates[i], False
        masked = [self.block(i) for i in here if self.mask[i]]
        if max_post is None:
            ended = True
        elif active in masked:
            ended = False
        elif had_mask:
            ended = max_post == 0
        else:
            post += 1
            ended = not written or post >= max_post
        if ended:
            active, post = min([last, *masked]), 0
        settled = max_post is not None or settled_stop
        for i in here:
            if self.block(i) >= active if settled else self.mask[i]:
                break
            if self.tokens[i] in eos:
                self.tokens = [self.tokens[i] if self.mask[j] else self.tokens[j] for j in here]
                self.mask, masked, active, post = [False for _ in here], [], last, 0
                break
        steps += had_mask
        status = EXHAUSTED if masked and steps >= max_steps else COMPLETE if active == last else RUNNING
        self.numbers = [steps, len(masked), active, status, *self.numbers[4:8], forwards + 1, post]
        self.allowed = [self.mask[i] and self.block(i) == active and status == RUNNING for i in here]
        return rank


def rows_of(state: State) -> list[Row]:
    assert state.editable is not None
    tensors = (state.buffer, state.mask, state.allowed, state.editable, state.rows)
    return [Row(*parts, state.block_length) for parts in zip(*(t.tolist() for t in tensors), strict=True)]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("max_post", [None, 0, 1, 3])
def test_equals_the_rules_written_out(max_post: int | None, everywhere: bool, device: torch.device) -> None:
    """Whole trajectories with few tokens, so that stop ids and candidates equal to the token are frequent."""
    ends = set()
    for seed in range(24):
        g = torch.Generator().manual_seed(seed)
        length, block_length = int(torch.randint(1, 14, (), generator=g)), int(torch.randint(1, 7, (), generator=g))
        state = random_state(g, 5, seed % 3, length, block_length, [0.4, 0.8, 1.0][seed % 3], extra=seed % 2)
        state.buffer[~state.mask] %= 8
        state = before = replace(state, editable=state.mask.clone())
        state.status[0] = seed % 3
        settings: dict[str, Any] = {"max_steps": [30, 5][seed % 2], "eos": [(), (3,), (5, 6)][seed // 2 % 3]}
        settings |= {"max_post": max_post, "everywhere": everywhere, "settled_stop": seed % 4 == 1}
        for _ in range(30):
            candidates = torch.randint(0, 8, (5, length), generator=g)
            candidates[torch.rand(5, length, generator=g) < 0.01] = -1
            select = torch.rand(5, length, generator=g) < 0.4
            revise = (
                torch.rand(5, length, generator=g) < torch.tensor([0.0, 0.2, 0.2, 0.5, 1.0])[torch.randperm(5)][:, None]
            )
            want = rows_of(state)
            choices = zip(candidates.tolist(), select.tolist(), revise.tolist(), strict=True)
            ranks = [row.step(choice, **settings) for row, choice in zip(want, choices, strict=True)]
            state, rank = run(state, candidates, select, device, revise=revise, **settings)
            assert rows_of(state) == want
            assert rank.tolist() == ranks
        ends |= set(state.status.tolist())
        assert torch.equal(state.buffer[~before.mask], before.buffer[~before.mask])  # what was given
    assert ends >= {COMPLETE, EXHAUSTED, POISONED}


# A row in blocks of 2, settings, and for each step: candidates, positions selected and revised, then tokens, allowed
# positions, (steps, block, status, forwards, post).
E = 7
STORIES: list[tuple[list[int], dict[str, Any], list[tuple[list[int], str, str, list[int], str, tuple[int, ...]]]]] = [
    # Until a step changes nothing; masks of the block and given tokens are not revised, nor blocks before or after it.
    ([4, M, M, M], {"max_post": 9}, [
        ([1, 2, 3, 4], "1", "0123", [4, 2, M, M], "", (1, 0, 0, 1, 0)),
        ([1, 5, 3, 4], "123", "0123", [4, 5, M, M], "", (1, 0, 0, 2, 1)),
        ([1, 5, 3, 4], "123", "0123", [4, 5, M, M], "23", (1, 1, 0, 3, 0)),
        ([1, 2, 3, 4], "2", "013", [4, 5, 3, M], "3", (2, 1, 0, 4, 0)),
        ([1, 2, 6, 4], "3", "012", [4, 5, 6, 4], "", (3, 1, 0, 5, 0)),
        ([1, 2, 3, 8], "", "", [4, 5, 6, 4], "", (3, 2, 1, 6, 0)),
        ([9, 9, 9, 9], "", "0123", [4, 5, 6, 4], "", (3, 2, 1, 6, 0)),
    ]),
    # The budget is spent.
    ([M, M], {"max_post": 2}, [
        ([1, 2], "01", "", [1, 2], "", (1, 0, 0, 1, 0)),
        ([3, 2], "", "0", [3, 2], "", (1, 0, 0, 2, 1)),
        ([1, 2], "", "0", [1, 2], "", (1, 1, 1, 3, 0)),
    ]),
    # Without a budget, and without editing, the block ends with its masks; a step with masks may still revise.
    *[([M, M, M], {"max_post": budget}, [
        ([1, 2, 3], "0", "", [1, M, M], "1", (1, 0, 0, 1, 0)),
        ([4, 5, 6], "1", "0", [4, 5, M], "2", (2, 1, 0, 2, 0)),
        ([1, 2, 3], "2", "01", [4, 5, 3], "", (3, 2, 1, 3, 0)),
    ]) for budget in (0, None)],
    # Everywhere: the first block is revised as well, and that keeps the second going.
    ([M, M, M], {"max_post": 5, "everywhere": True}, [
        ([1, 2, 3], "01", "", [1, 2, M], "", (1, 0, 0, 1, 0)),
        ([1, 2, 3], "", "", [1, 2, M], "2", (1, 1, 0, 2, 0)),
        ([4, 2, 3], "2", "012", [4, 2, 3], "", (2, 1, 0, 3, 0)),
        ([4, 8, 3], "", "012", [4, 8, 3], "", (2, 1, 0, 4, 1)),
        ([4, 8, 3], "", "012", [4, 8, 3], "", (2, 2, 1, 5, 0)),
    ]),
    # A stop id counts once its block has ended, and only if it is still there then.
    ([M, M, M, M], {"max_post": 5, "eos": E}, [
        ([E, 2, 3, 4], "0", "", [E, M, M, M], "1", (1, 0, 0, 1, 0)),
        ([1, E, 3, 4], "1", "0", [1, E, M, M], "", (2, 0, 0, 2, 0)),
        ([1, E, 3, 4], "", "01", [1, E, E, E], "", (2, 2, 1, 3, 0)),
    ]),
    ([M, M, M], {"settled_stop": True, "eos": E}, [
        ([E, 2, 3], "0", "", [E, M, M], "1", (1, 0, 0, 1, 0)),
        ([1, 2, 3], "1", "", [E, 2, E], "", (2, 2, 1, 2, 0)),
    ]),
    # Out of steps with masks left; but the last block may still be revised after the last step.
    ([M, M, M], {"max_post": 5, "max_steps": 1}, [([1, 2, 3], "01", "", [1, 2, M], "", (1, 0, 2, 1, 0))]),
    ([M, M], {"max_post": 5, "max_steps": 1}, [
        ([1, 2], "01", "", [1, 2], "", (1, 0, 0, 1, 0)),
        ([3, 2], "", "0", [3, 2], "", (1, 0, 0, 2, 1)),
        ([3, 2], "", "0", [3, 2], "", (1, 1, 1, 3, 0)),
    ]),
    # Undefined logits poison where they are revised, and only there.
    ([M, M], {"max_post": 5}, [
        ([1, -1], "0", "", [1, M], "1", (1, 0, 0, 1, 0)),
        ([-1, -1], "", "1", [1, M], "1", (2, 0, 0, 2, 0)),
        ([-1, 2], "1", "0", [1, M], "", (2, 0, 3, 2, 0)),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "settings", "script"), STORIES)
def test_hand_worked_rows(tokens: list[int], settings: dict[str, Any], script: list[Any], device: torch.device) -> None:
    state = one_row(tokens, 2)
    state = replace(state, editable=state.mask.clone())

    def flags(positions: str) -> torch.Tensor:
        return torch.tensor([[str(i) in positions for i in range(state.length)]])

    for candidates, select, revise, want, allowed, numbers in script:
        before, options = state, {"max_steps": 9, "revise": flags(revise), **settings}
        state, rank = run(state, torch.tensor([candidates]), flags(select), device, **options)
        assert state.tokens.tolist() == [want]
        assert torch.equal(state.allowed, flags(allowed))
        assert tuple(state.rows[0, [0, 2, 3, 8, 9]].tolist()) == numbers
        assert torch.equal(rank == -2, (state.tokens != before.tokens) & ~before.mask)


def test_draws_are_keyed_by_forwards(device: torch.device) -> None:
    """Steps do not matter, which stand still while a block is only revised."""
    state = many_rows(40, 3)
    state.forwards.fill_(5)
    arguments = torch.full((3, 40), 8), torch.zeros(3, 40)
    _, want = run(state, *arguments, device, mode="bernoulli", seed=3)
    state.steps.fill_(2)
    assert torch.equal(run(state, *arguments, device, mode="bernoulli", seed=3)[1], want)
    state.forwards.fill_(6)
    assert not torch.equal(run(state, *arguments, device, mode="bernoulli", seed=3)[1], want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_post": -1}, ValueError, "max_post: expected at least 0, or None, got -1"),
        ({"revise": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"revise: expected shape \(2, 4\), got \(2, 3\)"),
        ({"revise": torch.ones(2, 4)}, TypeError, "revise: expected bool, got float32"),
        ({"editable": None}, TypeError, "editable: expected a bool tensor for revise, got None"),
        ({"editable": torch.ones(2, 4)}, TypeError, "editable: expected bool, got float32"),
        ({"editable": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"editable: expected shape \(2, 4\)"),
    ],
)
def test_wrong_values_are_named(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    state = State.create(torch.full((2, 5), M), 1, M, 4, editable=True)
    before = moved(state, "cpu")
    if "editable" in change:
        state = replace(state, **change)
    arguments = {"revise": torch.ones(2, 4, dtype=torch.bool), **{k: v for k, v in change.items() if k != "editable"}}
    with pytest.raises(error, match=message):
        unmask_(state, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4), **arguments)
    assert_same(replace(state, editable=before.editable), before)
