"""The interface of tasks: problems with a prompt, a checkable answer and perhaps a reference response."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar


class Holes(tuple[int, ...]):
    """The ids of a whole text in which mask tokens are to be filled. It stands where a prompt could."""


class Dialogue(str):
    """A prompt of several turns. As a text they follow each other; a chat template gets them as ``messages``."""

    messages: list[dict[str, str]]

    @classmethod
    def of(cls, turns: Sequence[str]) -> Dialogue:
        """Of ``turns``: the user's and the assistant's in turn, the last the user's."""
        made = cls("\n\n".join(turn.strip() for turn in turns))
        roles = ("user", "assistant")
        made.messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return made


@dataclass(frozen=True)
class Problem:
    """One problem: the ``prompt`` for the model, the ``answer`` that a completion is graded against and, if the task
    has one, a full reference ``response``, which pretraining learns from."""

    prompt: str
    answer: str
    response: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    ids: Sequence[int] | None = None
    """For infilling: the ids of a whole text, with the model's mask token at each hole. The holes are filled, and
    nothing follows the text; ``prompt`` is then for people only. Either all problems of a task have ids, or none."""

    @property
    def given(self) -> str | Holes:
        """What the model gets: the ids if there are any, else the prompt."""
        return self.prompt if self.ids is None else Holes(self.ids)


class Task(ABC):
    """A stream of problems and an exact grader. Tasks never import torch.

    Raises ValueError for a class that gives fields of a dataclass new values without being one itself, as these would
    have no effect.
    """

    name: str
    instructions: ClassVar[bool] = False
    """Whether prompts are instructions in words, which a chat model takes as a user's message."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if lost := without_effect(cls):
            raise ValueError(
                f"task {cls.__name__} sets {', '.join(lost)} without being a dataclass itself, which has no effect: "
                "put @dataclass(frozen=True) above its class line"
            )
        return super().__new__(cls)

    @abstractmethod
    def sample(self, rng: random.Random) -> Problem:
        """Draw one problem; the same ``rng`` state gives the same problem on every machine."""

    @abstractmethod
    def grade(self, problem: Problem, completion: Any) -> float:
        """How well ``completion`` solves ``problem``, from 0 to 1; most tasks grade 1.0 or 0.0.

        It is a text up to the end of sequence, or for a problem with ``ids`` the list of the filled ids.
        """

    def grade_all(self, problems: Sequence[Problem], completions: Sequence[Any]) -> list[float]:
        """The grade of each completion. A task with slow grades may override it to grade several at once."""
        return [self.grade(p, c) for p, c in zip(problems, completions, strict=True)]

    def check_gradable(self, train: bool = False) -> None:
        """Raise FileNotFoundError, ImportError, RuntimeError or ValueError now if the task cannot be used later.

        It checks what :meth:`grade` needs and the source of the problems (with ``train``, of the training problems),
        but does not read them.
        """
        return None

    def phrased(self, template: str) -> Task:
        """The task with its prompts in another template, by its name or, if the task allows it, as a text.

        Raises ValueError for a template that the task does not have.
        """
        raise ValueError(f"{self.name} has no templates: its prompts have one form, which models are trained on")

    def easier(self, progress: float) -> Task:
        """The task at a point of a curriculum, from 0 (the easiest problems) to 1 (the task itself)."""
        return self

    def measures(self, problem: Problem, completion: Any) -> dict[str, float]:
        """Further numbers about a completion, averaged beside the accuracy; none by default."""
        return {}

    def problems(self, count: int, seed: int) -> list[Problem]:
        """``count`` problems drawn with ``random.Random(f"{name}/{seed}")``; distinct seeds are distinct sets."""
        rng = random.Random(f"{self.name}/{seed}")
        return [self.sample(rng) for _ in range(count)]

    def held_out(self, key: str) -> Problem:
        """A problem to choose configurations by: one of the test problems' kind, drawn with a key of its own."""
        return self.sample(random.Random(key))

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        """``count`` problems of an endless training stream from number ``first`` on, drawn unlike :meth:`problems`.

        Each depends only on the seed and its number, so that processes can share the stream and a run can resume
        anywhere. A finite set of problems is repeated in epochs.
        """
        return [self.sample(random.Random(f"{self.name}/train/{seed}/{i}")) for i in range(first, first + count)]


def without_effect(kind: type) -> list[str]:
    """Names of the fields of a dataclass that ``kind`` or a parent sets without being a dataclass by itself."""
    lost = []
    for owner in kind.__mro__:
        if "__dataclass_fields__" in vars(owner):
            break
        lost += [f.name for f in fields(kind) if f.name in vars(owner)] if is_dataclass(kind) else []
    return sorted(set(lost))
