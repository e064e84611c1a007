"""``gsm8k``: grade-school word problems with whole-number answers (Cobbe et al., 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.answer_task import AnswerTask
from unmask.tasks.answers import normalise
from unmask.tasks.base import Problem


@dataclass(frozen=True)
class GSM8K(AnswerTask):
    """1,319 test and 7,473 training problems. A completion is graded by its final answer, see
    :func:`~unmask.tasks.answers.extract_answer`; ``grading`` is "strict" or "math-verify".
    """

    DATASET = "openai/gsm8k"
    CONFIG = "main"
    SPLITS = ("train", "test")
    FIELDS = ("question", "answer")
    TEMPLATES = {
        "default": "Solve this problem. Reason step by step, then give the final answer, a number alone, in "
        "\\boxed{}.\n\n{problem}",
        "last": "{problem}\n\nReason step by step, and put the final answer, a number alone, in \\boxed{}.",
        "question": "Question: {problem}\nThink step by step. Write the answer as \\boxed{number}.\nAnswer:",
        "plain": "{problem}",
    }

    grading: str = "strict"
    name: str = "gsm8k"

    def problem(self, row: Mapping[str, Any]) -> Problem:
        reasoning, marked, answer = row["answer"].rpartition("####")
        if not marked:
            raise ValueError("the answer has no final number after ####")
        reasoning = re.sub(r"<<[^>]*>>", "", reasoning).strip()  # the calculator's annotations
        answer = normalise(answer)
        return Problem(
            self.prompt(problem=row["question"].strip()), answer, f"{reasoning}\nThe answer is \\boxed{{{answer}}}."
        )
