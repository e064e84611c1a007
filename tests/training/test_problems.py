"""What a run is judged by is neither trained on nor what results are reported on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.tasks import make_task
from unmask.tasks.base import Task
from unmask.training.problems import TrainingProblems


@pytest.fixture
def words(tmp_path: Path) -> Task:
    """GSM8K with 20 training and 5 test problems."""
    for name, count, kind in (("train", 20, "train"), ("test", 5, "test")):
        rows = [{"question": f"{kind} {i}", "answer": f"#### {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task("gsm8k", path=str(tmp_path / "test.jsonl"), train_path=str(tmp_path / "train.jsonl"))


def test_held_out_of_a_finite_set(words: Task) -> None:
    problems = TrainingProblems(words, seed=3, count=6, hold_out=True)
    held = {p.prompt for p in problems.validation}
    epochs = [{p.prompt for p in problems.take(first, 14)} for first in (0, 14, 28)]
    assert len(held) == 6
    assert all(len(epoch) == 14 and not epoch & held for epoch in epochs)
    assert held | epochs[0] == {p.prompt for p in words.all_problems(train=True)}  # type: ignore[attr-defined]
    assert not held & {p.prompt for p in words.problems(5, 3)}
    assert problems.take(20, 3) == problems.take(14, 14)[6:9]  # any process may begin anywhere
    other = TrainingProblems(words, seed=4, count=6, hold_out=True)
    assert {p.prompt for p in other.validation} != held


def test_without_evaluations_all_is_trained_on(words: Task) -> None:
    problems = TrainingProblems(words, seed=3, count=6, hold_out=False)
    assert problems.validation == []
    assert problems.take(5, 30) == words.training_problems(3, 5, 30)


def test_too_few_problems_are_named(words: Task) -> None:
    with pytest.raises(
        ValueError, match="eval_problems=20 leaves nothing to train on of the 20 training problems of gsm8k"
    ):
        TrainingProblems(words, seed=0, count=20, hold_out=True)


def test_generated_problems_have_a_key_of_their_own() -> None:
    hops = make_task("hops")
    problems = TrainingProblems(hops, seed=0, count=100, hold_out=True)
    assert problems.take(7, 5) == hops.training_problems(0, 7, 5)
    held = {p.prompt for p in problems.validation}
    assert len(held) == 100
    assert not held & {p.prompt for p in hops.problems(1000, 0)}
    assert not held & {p.prompt for p in hops.training_problems(0, 0, 1000)}
    assert problems.validation == TrainingProblems(hops, seed=0, count=100, hold_out=False).validation
