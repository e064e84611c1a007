"""Several tasks as one, each problem graded by its own: finite sets shuffled together, generated ones in turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from typing_extensions import Self

from unmask.tasks.base import Problem, Task
from unmask.tasks.finite import ProblemSet


@dataclass(frozen=True)
class Several(Task):
    """What mixtures have in common; ``metadata["task"]`` names a problem's task."""

    tasks: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.kinds) < 2 or any(task != self.kinds[task.name] for task in self.tasks):
            raise ValueError(f"a mixture needs several tasks of different names, got {self.name!r}")
        finite = [isinstance(task, ProblemSet) for task in self.tasks]
        if len(set(finite)) > 1:
            pair = [self.tasks[finite.index(kind)].name for kind in (False, True)]
            raise ValueError(
                "task {!r} makes problems without end and {!r} has a finite set: they do not mix".format(*pair)
            )

    @property
    def kinds(self) -> dict[str, Task]:
        """The tasks by their names, each once."""
        return {task.name: task for task in self.tasks}

    @property
    def name(self) -> str:  # type: ignore[override]
        """The tasks' names, joined by "+"."""
        return "+".join(task.name for task in self.tasks)

    @property
    def instructions(self) -> bool:  # type: ignore[override]
        """Whether the prompts of all tasks are instructions."""
        return all(task.instructions for task in self.tasks)

    def phrased(self, template: str) -> Self:
        return replace(self, tasks=tuple(task.phrased(template) for task in self.tasks))

    def easier(self, progress: float) -> Self:
        return replace(self, tasks=tuple(task.easier(progress) for task in self.tasks))

    def check_gradable(self, train: bool = False) -> None:
        for task in self.tasks:
            task.check_gradable(train)

    def own(self, problem: Problem) -> Task:
        """The task that ``problem`` comes from."""
        return self.kinds[problem.metadata["task"]]

    def grade(self, problem: Problem, completion: Any) -> float:
        return self.own(problem).grade(problem, completion)

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[Any]) -> list[float]:
        grades = [0.0] * len(problems)
        for name, task in self.kinds.items():
            own = [i for i, problem in enumerate(problems) if problem.metadata["task"] == name]
            found = task.grade_all([problems[i] for i in own], [completions[i] for i in own])
            for i, grade in zip(own, found, strict=True):
                grades[i] = grade
        return grades

    def measures(self, problem: Problem, completion: Any) -> dict[str, float]:
        return self.own(problem).measures(problem, completion)


@dataclass(frozen=True)
class Mixture(Several, ProblemSet):
    """The problems of all ``tasks``, which have finite sets of them, drawn uniformly: "gsm8k+math" by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) < len(self.tasks):
            raise ValueError(f"a finite set of problems has no second turn in a mixture, got {self.name!r}")

    def all_problems(self, train: bool = False) -> tuple[Problem, ...]:
        return joined(self, train)


@dataclass(frozen=True)
class Turns(Several):
    """Problems of ``tasks`` that make them without end, of each in turn: "story+line" by name.

    One that is named twice has twice as many: "story+line+line".
    """

    def sample(self, rng: random.Random) -> Problem:
        task = rng.choice(self.tasks)
        return noted(task.sample(rng), task)

    def held_out(self, key: str) -> Problem:
        task = random.Random(key).choice(self.tasks)
        return noted(task.held_out(f"{key}/{task.name}"), task)

    def turns(self, first: int, count: int) -> list[tuple[str, int]]:
        """Of ``count`` problems from number ``first`` on: whose turn it is, and which problem of that task."""
        names = [task.name for task in self.tasks]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        rounds = (divmod(i, len(names)) for i in range(first, first + count))
        return [(names[i], r * names.count(names[i]) + earlier[i]) for r, i in rounds]

    def problems(self, count: int, seed: int) -> list[Problem]:
        turns = self.turns(0, count)
        most = {name: n + 1 for name, n in turns}
        sets = {name: self.kinds[name].problems(n, seed) for name, n in most.items()}
        return [noted(sets[name][n], self.kinds[name]) for name, n in turns]

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        turns = [(self.kinds[name], n) for name, n in self.turns(first, count)]
        return [noted(task.training_problems(seed, n, 1)[0], task) for task, n in turns]


def mixture(tasks: Sequence[Task]) -> Several:
    """``tasks`` as one.

    Raises ValueError for two different ones of the same name, for a finite one twice, and for finite and endless ones
    together.
    """
    return (Mixture if all(isinstance(task, ProblemSet) for task in tasks) else Turns)(tuple(tasks))


def noted(problem: Problem, task: Task) -> Problem:
    """``problem`` with its task's name in its metadata."""
    return replace(problem, metadata={**problem.metadata, "task": task.name})


@lru_cache(maxsize=8)
def joined(mixture: Mixture, train: bool) -> tuple[Problem, ...]:
    return tuple(noted(problem, task) for task in mixture.tasks for problem in task.all_problems(train))
