"""``mbpp``: mostly basic Python problems (Austin et al., 2021)."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.tasks.base import Problem
from unmask.tasks.code import CodeTask, extract_code, global_names


@dataclass(frozen=True)
class MBPP(CodeTask):
    """500 test and 374 training problems (``subset="full"``), or the reviewed 257 and 120 (``"sanitized"``).

    A local file may be of either subset.
    """

    DATASET = "google-research-datasets/mbpp"
    SPLITS = ("train", "test", "validation", "prompt")
    FIELDS = ("task_id", "code", "test_list")
    TEMPLATES = {
        "default": "{problem}\n\nWrite a self-contained Python function, with the imports that it needs, in one code "
        "block. It must pass these tests:\n\n```python\n{tests}\n```",
        "first": "Write a Python function, with its imports, in one code block.\n\n{problem}\n\nIt has to "
        "pass:\n{tests}",
        "plain": "{problem}\n{tests}",
    }

    subset: str = "full"
    name: str = "mbpp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in ("full", "sanitized"):
            raise ValueError(f"unknown subset {self.subset!r}; known are full, sanitized")

    def config(self) -> str:
        return self.subset

    def problem(self, row: Mapping[str, Any]) -> Problem:
        text = row.get("text", row.get("prompt"))
        if text is None:
            raise ValueError("no field 'text' or 'prompt'")
        if not row["test_list"]:
            raise ValueError("test_list is empty")
        asserts = "\n".join(row["test_list"])
        shown = f"{row.get('test_setup_code') or ''}\n{asserts}".strip()
        tests = "\n".join([*(row.get("test_imports") or ()), *imports(row["code"], shown), shown])
        metadata = {"task_id": row["task_id"], "tests": tests, "entry_points": used(row["code"], tests)}
        prompt = self.prompt(problem=text.strip(), tests=shown)
        return Problem(prompt, row["code"], f"```python\n{row['code'].strip()}\n```", metadata)

    def program(self, problem: Problem, completion: str) -> str:
        return extract_code(completion, (problem.metadata["entry_points"] or [""])[0])


def used(code: str, tests: str) -> list[str]:
    """Functions and classes of ``code`` that ``tests`` name, in the order of their definition."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = global_names(tests)[1]
    return [node.name for node in ast.parse(code).body if isinstance(node, definitions) and node.name in named]


def imports(code: str, tests: str) -> list[str]:
    """Imports of ``code`` that ``tests`` use, so that they do not depend on the program's."""
    found = [ast.unparse(node) for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [text for text in found if global_names(text)[0] & global_names(tests)[1]]
