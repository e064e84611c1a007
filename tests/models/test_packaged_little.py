"""The packaged model of words: what it answers, and how it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import unmask
from unmask import Sampler
from unmask.tasks import LITTLE

LEAST = {"parcel": 0.4, "story": 0.75, "gaps": 0.6}
"""Accuracy on the problems below that the weights must keep; 0.85 of the others."""


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_pretrained("little")


@pytest.mark.parametrize("name", sorted(LITTLE))
def test_it_solves_its_tasks(sampler: Sampler, name: str) -> None:
    task = LITTLE[name]()
    problems = task.problems(24, seed=100)
    result = sampler.generate([p.prompt for p in problems], max_new_tokens=64 if name in ("quiz", "form") else 48)
    assert result.finished.all()
    grades = task.grade_all(problems, result.texts or [])
    assert sum(grades) / 24 >= LEAST.get(name, 0.85)
    assert result.steps.float().mean() < 20


def test_an_answer_that_a_person_can_check(sampler: Sampler) -> None:
    asked = "Ann has 7 pears. She buys 5 more. She gives 3 to Tom. How many pears does Ann have now?"
    assert sampler.generate(asked).texts == ["7 + 5 = 12. 12 - 3 = 9. Answer: 9."]
    assert sampler.policy.spec == "little,hold-eos"
    assert sampler.config.max_new_tokens == 64
    assert sampler.config.block_length is None
    forwards = sampler.policy.bare.config.calibration[0].nfe
    assert max(forwards) / min(forwards) > 1.8


def test_one_look_is_not_enough_where_answers_constrain_each_other(sampler: Sampler) -> None:
    task = LITTLE["letters"]()
    problems = task.problems(24, seed=100)
    prompts = [p.prompt for p in problems]
    at_once = Sampler(sampler.model, sampler.tokenizer, "threshold:0").generate(prompts, max_new_tokens=32)
    assert (at_once.steps == 1).all()
    assert sum(task.grade_all(problems, at_once.texts or [])) / 24 < 0.5


def test_its_size() -> None:
    folder = Path(unmask.__file__).parent / "models/little"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    assert sum(p.numel() for p in unmask.load_model("little").parameters()) == 1_934_016
