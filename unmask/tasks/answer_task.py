"""The base of mathematics benchmarks: problems with one final answer."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.tasks.answers import check_grading, grade_answer
from unmask.tasks.base import Problem
from unmask.tasks.finite import FiniteTask


@dataclass(frozen=True)
class AnswerTask(FiniteTask):
    """A benchmark whose completions are graded by their final answer; ``grading`` is "strict" or "math-verify"."""

    grading: str = "math-verify"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grading(self.grading)

    def grade(self, problem: Problem, completion: str) -> float:
        return grade_answer(problem.answer, completion, self.grading)
