"""``gsm8k``: grade-school word problems with whole-number answers (Cobbe et al., 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.answers import check_grading, grade_answer, normalise
from unmask.tasks.base import Problem
from unmask.tasks.finite import FiniteTask

PROMPT = r"""Solve this problem. Reason step by step, then give the final answer, a number alone, in \boxed{}.

"""


@dataclass(frozen=True)
class GSM8K(FiniteTask):
    """1,319 test and 7,473 training problems. A completion is graded by its final answer, see
    :func:`~unmask.tasks.answers.extract_answer`; ``grading`` is "strict" or "math-verify".
    """

    DATASET = "openai/gsm8k"
    CONFIG = "main"
    SPLITS = ("train", "test")
    FIELDS = ("question", "answer")

    grading: str = "strict"
    name: str = "gsm8k"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grading(self.grading)

    def problem(self, row: Mapping[str, Any]) -> Problem:
        reasoning, marked, answer = row["answer"].rpartition("####")
        if not marked:
            raise ValueError("the answer has no final number after ####")
        reasoning = re.sub(r"<<[^>]*>>", "", reasoning).strip()  # the calculator's annotations
        answer = normalise(answer)
        return Problem(PROMPT + row["question"].strip(), answer, f"{reasoning}\nThe answer is \\boxed{{{answer}}}.")

    def grade(self, problem: Problem, completion: str) -> float:
        return grade_answer(problem.answer, completion, self.grading)
