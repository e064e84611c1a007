"""Steps remembered from block to block, and a policy's memory as requests come and go."""

from __future__ import annotations

import torch

from unmask.serving.requests import BatchMemory, BlockState, Progress


def advance(progress: Progress, request: str, end: int, steps: int) -> BlockState:
    state = progress.enter(request, end)
    for _ in range(steps):
        progress.advance(state)
    return state


def test_the_next_block_continues_the_count() -> None:
    progress = Progress(8)
    assert advance(progress, "a", 16, 3).total == 3
    assert advance(progress, "a", 24, 2).total == 5
    assert progress.enter("a", 32).total == 5
    assert progress.enter("b", 32).total == 0


def test_a_block_begun_again_counts_from_its_start() -> None:
    progress = Progress(8)
    advance(progress, "a", 16, 3)
    advance(progress, "a", 24, 2)
    assert progress.enter("a", 24).total == 3


def test_an_id_used_again_is_another_request() -> None:
    progress = Progress(8)
    advance(progress, "a", 24, 3)
    assert progress.enter("a", 16).total == 0
    assert progress.enter("a", 40).total == 0


def test_entering_changes_nothing() -> None:
    progress = Progress(8)
    advance(progress, "a", 16, 3)
    progress.enter("a", 24)
    progress.enter("a", 8)
    assert progress.enter("a", 24).total == 3


def test_the_request_not_heard_of_for_longest_is_forgotten() -> None:
    progress = Progress(8, capacity=2)
    for request in "aba":
        advance(progress, request, 8, 1)
    advance(progress, "c", 8, 1)
    assert [progress.enter(r, 16).total for r in "abc"] == [1, 0, 1]


def test_keys_are_the_same_everywhere_and_differ_between_requests() -> None:
    assert BlockState("request-1", 8).key == BlockState("request-1", 99).key == 2651162329
    assert len({BlockState(str(i), 8).key for i in range(1000)}) == 1000


def test_memory_follows_its_request() -> None:
    memory, (a, b, c) = BatchMemory(), (BlockState(name, 8) for name in "abc")
    batch = memory.gather([a, b])
    assert batch == {}
    batch["x"] = torch.tensor([1.0, 2.0])
    batch["note"] = "not a tensor"  # type: ignore[assignment]
    memory.scatter()
    assert memory.gather([a, b]) is batch
    batch["x"].add_(10)
    memory.scatter()
    assert memory.gather([c, b])["x"].tolist() == [0.0, 12.0]
    memory.scatter()
    assert memory.gather([b, a, c])["x"].tolist() == [12.0, 11.0, 0.0]
