"""What a task is: problems with a prompt, a checkable answer and, for generated tasks, a written solution."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """One problem: the ``prompt`` shown to the model, the ``answer`` a completion is graded against, and, where
    the task can write one, a full reference ``response`` (what a pretraining run learns from)."""

    prompt: str
    answer: str
    response: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A stream of problems and an exact grader. Tasks never import torch."""

    name: str
    instructions: ClassVar[bool] = False
    """Whether prompts are instructions in words, to be put to a chat model as a user's message."""

    @abstractmethod
    def sample(self, rng: random.Random) -> Problem:
        """Draw one problem; the same ``rng`` state gives the same problem on every machine."""

    @abstractmethod
    def grade(self, problem: Problem, completion: str) -> float:
        """1.0 if ``completion`` (text up to the end of sequence) solves ``problem``, else 0.0."""

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float]:
        """What :meth:`grade` says of each completion; a task whose grades take long overrides it to work on several
        at a time."""
        return [self.grade(p, c) for p, c in zip(problems, completions, strict=True)]

    def check_gradable(self, train: bool = False) -> None:
        """Raise now what would keep the task from being used, before a model is loaded or anything decoded for it.

        That is what :meth:`grade` needs and where the problems come from (with ``train``, the training problems):
        FileNotFoundError, ImportError, RuntimeError or ValueError. The problems themselves are not read.
        """
        return None

    def easier(self, progress: float) -> Task:
        """The task at a point of a curriculum, from 0 (a beginner's problems) to 1 (the task itself)."""
        return self

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """Further numbers about a completion, averaged beside the accuracy; none by default."""
        return {}

    def problems(self, count: int, seed: int) -> list[Problem]:
        """``count`` problems drawn with ``random.Random(f"{name}/{seed}")``; distinct seeds are distinct sets."""
        rng = random.Random(f"{self.name}/{seed}")
        return [self.sample(rng) for _ in range(count)]

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        """Problems number ``first`` and on of an endless training stream, apart from what :meth:`problems` draws.

        Each depends on the seed and its number alone, so that processes can share the stream and a run can resume
        anywhere. A task with a finite set of problems overrides this to go through it epoch by epoch.
        """
        return [self.sample(random.Random(f"{self.name}/train/{seed}/{i}")) for i in range(first, first + count)]
