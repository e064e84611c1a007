"""``math500``: 500 competition problems of MATH (Hendrycks et al., 2021; the selection of Lightman et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.answer_task import AnswerTask
from unmask.tasks.base import Problem


@dataclass(frozen=True)
class Math500(AnswerTask):
    """500 test problems with answers in LaTeX. There is no training split: training needs ``train_path``.

    ``grading`` is "math-verify", since one answer can be written in many ways, or "strict".
    """

    DATASET = "HuggingFaceH4/MATH-500"
    SPLITS = ("test",)
    FIELDS = ("problem", "answer")
    TEMPLATES = {
        "default": "Solve this problem. Reason step by step, then give the final answer in \\boxed{}.\n\n{problem}",
        "last": "{problem}\n\nReason step by step, and put the final answer in \\boxed{}.",
        "question": "Question: {problem}\nThink step by step. Write the answer as \\boxed{answer}.\nAnswer:",
        "plain": "{problem}",
    }

    name: str = "math500"

    def problem(self, row: Mapping[str, Any]) -> Problem:
        answer = row["answer"].strip()
        if not answer:
            raise ValueError("the answer is empty")
        metadata = {k: row[k] for k in ("subject", "level", "unique_id") if k in row}
        return Problem(self.prompt(problem=row["problem"].strip()), answer, row.get("solution", ""), metadata)
