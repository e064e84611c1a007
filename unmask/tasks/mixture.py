"""Several tasks as one: their problems shuffled together, each graded by its own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from unmask.tasks.base import Problem
from unmask.tasks.finite import ProblemSet


@dataclass(frozen=True)
class Mixture(ProblemSet):
    """The problems of all ``tasks``, which must have finite sets of them: "gsm8k+math" by name.

    Problems are drawn uniformly from the union; ``metadata["task"]`` names a problem's task.
    """

    tasks: tuple[ProblemSet, ...]

    def __post_init__(self) -> None:
        for task in self.tasks:
            if not isinstance(task, ProblemSet):
                raise ValueError(f"task {task.name!r} makes problems without end, so it cannot be part of a mixture")
        if len({task.name for task in self.tasks}) < max(2, len(self.tasks)):
            raise ValueError(f"a mixture needs several tasks of different names, got {self.name!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The tasks' names, joined by "+"."""
        return "+".join(task.name for task in self.tasks)

    @property
    def instructions(self) -> bool:  # type: ignore[override]
        """Whether the prompts of all tasks are instructions."""
        return all(task.instructions for task in self.tasks)

    def phrased(self, template: str) -> Mixture:
        return replace(self, tasks=tuple(task.phrased(template) for task in self.tasks))  # type: ignore[misc]

    def all_problems(self, train: bool = False) -> tuple[Problem, ...]:
        return joined(self, train)

    def check_gradable(self, train: bool = False) -> None:
        for task in self.tasks:
            task.check_gradable(train)

    def own(self, problem: Problem) -> ProblemSet:
        """The task that ``problem`` comes from."""
        return next(task for task in self.tasks if task.name == problem.metadata["task"])

    def grade(self, problem: Problem, completion: str) -> float:
        return self.own(problem).grade(problem, completion)

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float]:
        grades = [0.0] * len(problems)
        for task in self.tasks:
            own = [i for i, problem in enumerate(problems) if self.own(problem) is task]
            found = task.grade_all([problems[i] for i in own], [completions[i] for i in own])
            for i, grade in zip(own, found, strict=True):
                grades[i] = grade
        return grades

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        return self.own(problem).measures(problem, completion)


@lru_cache(maxsize=8)
def joined(mixture: Mixture, train: bool) -> tuple[Problem, ...]:
    return tuple(
        replace(problem, metadata={**problem.metadata, "task": task.name})
        for task in mixture.tasks
        for problem in task.all_problems(train)
    )
