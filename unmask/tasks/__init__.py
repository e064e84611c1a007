"""Problems with checkable answers. A new task is one file here and one line in ``TASKS``."""

from __future__ import annotations

from unmask.tasks.base import Problem, Task
from unmask.tasks.hops import Hops
from unmask.tasks.sudoku import Sudoku
from unmask.tasks.sums import Sums

TASKS: dict[str, type[Task]] = {"hops": Hops, "sums": Sums, "sudoku": Sudoku}


def make_task(name: str) -> Task:
    """The task called ``name`` with its default settings; ValueError lists the known names."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]()


__all__ = ["TASKS", "Hops", "Problem", "Sudoku", "Sums", "Task", "make_task"]
