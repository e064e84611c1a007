"""Problems with checkable answers. A new task is one file here and one line in ``TASKS``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unmask.tasks.base import Problem, Task
from unmask.tasks.gsm8k import GSM8K
from unmask.tasks.hops import Hops
from unmask.tasks.humaneval import HumanEval
from unmask.tasks.math500 import Math500
from unmask.tasks.mbpp import MBPP
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sums import Sums

TASKS: dict[str, type[Task]] = {
    "hops": Hops,
    "sums": Sums,
    "sudoku": Sudoku,
    "gsm8k": GSM8K,
    "math500": Math500,
    "humaneval": HumanEval,
    "mbpp": MBPP,
}


def make_task(name: str, **options: Any) -> Task:
    """The task called ``name``, its fields changed by ``options``; ValueError lists the known names."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(sorted(TASKS))}")
    known = sorted({f.name for f in fields(TASKS[name])} - {"name"})  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no options {', '.join(unknown)}; known are {', '.join(known)}")
    return TASKS[name](**options)


__all__ = [
    "GSM8K",
    "MBPP",
    "TASKS",
    "Hops",
    "HumanEval",
    "Math500",
    "Problem",
    "Sudoku",
    "Sums",
    "Task",
    "make_task",
]
