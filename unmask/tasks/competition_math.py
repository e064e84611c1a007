"""``math``: competition problems, MATH with its training split (Hendrycks et al., 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.answer_task import AnswerTask
from unmask.tasks.answers import last_boxed
from unmask.tasks.base import Problem
from unmask.tasks.math500 import Math500


@dataclass(frozen=True)
class Math(AnswerTask):
    r"""7,500 training and 5,000 test problems; the answer is in the solution's last ``\boxed``.

    MATH-500 is a part of the test problems, so evaluate on ``math500``. ``grading`` is as there.
    """

    DATASET = "DigitalLearningGmbH/MATH-lighteval"
    SPLITS = ("train", "test")
    FIELDS = ("problem", "solution")
    TEMPLATES = Math500.TEMPLATES

    name: str = "math"

    def problem(self, row: Mapping[str, Any]) -> Problem:
        solution = row["solution"]
        answer = boxed(solution)
        if not answer:
            raise ValueError("the solution has no answer in a box")
        metadata = {k: row[k] for k in ("type", "level") if k in row}
        return Problem(self.prompt(problem=row["problem"].strip()), answer, solution, metadata)


def boxed(solution: str) -> str | None:
    r"""The content of a solution's last box; some boxes of MATH have no braces: ``\boxed 9$``."""
    found = last_boxed(solution)
    if found is None and (bare := re.findall(r"\\f?boxe?d?\s+([^\s$.]+)", solution)):
        found = bare[-1]
    return None if found is None else found.strip()
