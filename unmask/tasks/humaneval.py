"""``humaneval``: Python functions to complete from their docstrings (Chen et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.base import Problem
from unmask.tasks.code import CodeTask, continued, defines, extract_code


@dataclass(frozen=True)
class HumanEval(CodeTask):
    """164 problems. There is no training split: training needs ``train_path``."""

    DATASET = "openai/openai_humaneval"
    SPLITS = ("test",)
    FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    TEMPLATES = {
        "default": "Complete this Python function. Answer with the whole function, self-contained and with the imports "
        "that it needs, in one code block.\n\n```python\n{problem}\n```",
        "last": "```python\n{problem}\n```\n\nWrite this function out in full, with its imports, in one code block.",
        "plain": "{problem}",
    }

    name: str = "humaneval"

    def problem(self, row: Mapping[str, Any]) -> Problem:
        entry = row["entry_point"]
        definition = defines(row["prompt"], entry)
        if not definition:
            raise ValueError(f"the prompt does not define {entry!r}")
        helpers = row["prompt"][: definition.start()]  # the tests must not use the program's own helpers
        solution = row["prompt"] + row["canonical_solution"]
        tests = f"{helpers}\n{row['test']}\n\ncheck({entry})\n"
        metadata = {"task_id": row["task_id"], "code": row["prompt"], "tests": tests, "entry_points": [entry]}
        prompt = self.prompt(problem=row["prompt"].strip())
        return Problem(prompt, row["canonical_solution"], f"```python\n{solution.strip()}\n```", metadata)

    def program(self, problem: Problem, completion: str) -> str:
        """The completion's function after the problem's imports and helpers. Code that does not define the function
        continues the problem's code."""
        start, entry = problem.metadata["code"], problem.metadata["entry_points"][0]
        code = extract_code(completion, entry)
        definition = defines(start, entry)
        if definition and defines(code, entry):
            return f"{start[: definition.start()]}\n{code}"
        return continued(start, code)
