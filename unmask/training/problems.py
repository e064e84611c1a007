"""The problems of a training run: those of its rollouts, and those of its evaluations.

Evaluations during training choose ``best/``, so they must not use the test problems. Their problems come from the
training problems and are never trained on.
"""

from __future__ import annotations

import random
from typing import Any

from unmask.tasks.base import Problem, Task
from unmask.tasks.finite import ProblemSet


class TrainingProblems:
    """A task's stream of training problems, and ``count`` other problems for ``validation``.

    With ``hold_out`` a finite task holds out the last training problems of a shuffled order, without it none. A task
    that generates problems draws them with a key of their own.
    """

    def __init__(self, task: Task, seed: int, count: int, hold_out: bool) -> None:
        self.task, self.seed = task, seed
        self.validation: list[Problem] = []
        if not isinstance(task, ProblemSet):
            keys = (f"{task.name}/validation/{seed}/{i}" for i in range(count))
            self.validation = [task.held_out(key) for key in keys]
        elif hold_out:
            everything = task.all_problems(train=True)
            if count >= len(everything):
                raise ValueError(
                    f"eval_problems={count} leaves nothing to train on of the {len(everything)} training problems of "
                    f"{task.name}"
                )
            order = list(range(len(everything)))
            random.Random(f"{task.name}/validation/{seed}").shuffle(order)
            self.validation = [everything[i] for i in order[-count:]]
            self.task = Remaining(task, set(order[-count:]))

    def take(self, first: int, count: int) -> list[Problem]:
        """``count`` problems of the training stream from number ``first`` on; see :meth:`Task.training_problems`."""
        return self.task.training_problems(self.seed, first, count)

    def known(self, count: int) -> list[Problem]:
        """The problems of a finite task, else the first ``count``, and those for validation."""
        task = self.task
        every = task.all_problems(train=True) if isinstance(task, ProblemSet) else self.take(0, count)
        return [*every, *self.validation]


class Remaining(ProblemSet):
    """A set of problems without some of its training problems."""

    def __init__(self, task: ProblemSet, without: set[int]) -> None:
        self.whole, self.name = task, task.name
        self.kept = tuple(p for i, p in enumerate(task.all_problems(train=True)) if i not in without)

    def all_problems(self, train: bool = False) -> tuple[Problem, ...]:
        return self.kept if train else self.whole.all_problems()

    def grade(self, problem: Problem, completion: Any) -> float:
        return self.whole.grade(problem, completion)
