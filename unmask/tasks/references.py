"""Check that a task accepts its own reference answers: ``python -m unmask.tasks.references humaneval path=FILE``.

A problem whose reference fails would count against every model. It fails if it exceeds the limits on programs, or if
the data are wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from unmask.tasks import make_task
from unmask.tasks.base import Problem, Task
from unmask.tasks.code import CodeTask


def failing_references(task: Task, problems: Sequence[Problem]) -> list[Problem]:
    """The problems whose reference response is graded below 1."""
    given = [problem for problem in problems if problem.response]
    grades = task.grade_all(given, [problem.response for problem in given])
    return [problem for problem, grade in zip(given, grades, strict=True) if grade < 1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each problem whose reference fails; 1 if there is any, else 0."""
    parser = argparse.ArgumentParser("python -m unmask.tasks.references", description=__doc__)
    parser.add_argument("task", help='a task by name, or "a+b"')
    parser.add_argument("options", nargs="*", metavar="name=value", help="options of the task, such as path=FILE")
    parser.add_argument("--problems", type=int, default=10**9, help="how many to draw; all by default")
    args = parser.parse_args(arguments)
    task = make_task(args.task, **dict(pair(text) for text in args.options))
    task.check_gradable()
    problems = task.problems(args.problems, seed=0)
    failing = failing_references(task, problems)
    for problem in failing:
        why = task.run(problem, problem.response).reason if isinstance(task, CodeTask) else f"answer {problem.answer}"
        print(f"{problem.metadata.get('task_id', problem.prompt)}: {why}")
    print(f"{task.name}: {len(failing)} of {sum(bool(p.response) for p in problems)} references fail")
    return int(bool(failing))


def pair(text: str) -> tuple[str, Any]:
    """``name=value``, the value as JSON, else as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    raise SystemExit(main())
