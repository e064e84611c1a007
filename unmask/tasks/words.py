"""What the worded tasks share: their vocabulary of names and things, phrasings, and the split of their problems.

Worded tasks ask in plain English and are small enough for the packaged model ``little``. A problem's content decides
by a hash whether it belongs to the training, validation or test problems, whichever phrasing asks for it.
"""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from unmask.tasks.base import Problem, Task

Parts = Annotated[int, Field(ge=1, le=100)]
"""How many steps or questions a problem may have."""


def words(text: str) -> list[str]:
    return text.split()


SHE = words("Ann Cleo Eve Fay Gina Ida Kim Lily Mary Nina Rosa Una")
HE = words("Ben Carl Dan Finn Gus Hugo Jack Leo Max Ned Paul Tom")
NAMES = sorted(SHE + HE)
ANIMALS = words(
    "ant ape bat bear bee bird cat cow crab deer dog duck eagle eel elk fish fox frog goat goose hare hawk hen horse "
    "lamb lion lynx mole moose mouse owl ox pig pony puma rabbit rat raven seal sheep swan tiger toad trout wasp "
    "whale wolf worm"
)
FOODS = words(
    "apple apricot banana bean bread butter cake carrot cherry corn egg fig grape ham honey jam leek lemon lime "
    "melon milk mint nut onion orange pasta peach pear plum rice salad salt soup sugar tea toast tuna"
)
THINGS = words("apples balls books coins eggs figs nuts pears pens plums shells stamps")
COLOURS = words("black blue brown gold green grey pink red white yellow")
CITIES = words("Athens Berlin Cairo Dublin Lima London Oslo Paris Quito Rome Tokyo Vienna")
HOBBIES = words("chess dancing drawing fishing football hiking music reading rowing singing swimming tennis")
JOBS = words("baker cook doctor driver farmer lawyer nurse painter pilot sailor singer teacher")

SPLITS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}
"""A tenth of all problems is for tests and another one for validation."""


@dataclass(frozen=True)
class Content:
    """What a problem is about, before it is put in words.

    ``key`` tells problems apart; ``slots`` fill the templates.
    """

    key: str
    slots: dict[str, str]
    answer: str
    response: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WordedTask(Task):
    """A generated task in English. ``split`` says whose problems :meth:`problems` draws: test, validation or train.

    ``template`` chooses one phrasing by number. None draws from all but the last, which training never shows.
    """

    TEMPLATES: ClassVar[tuple[str, ...]]

    split: str = "test"
    template: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.template is not None and self.template not in range(len(self.TEMPLATES)):
            raise ValueError(f"template must be None or 0 to {len(self.TEMPLATES) - 1}, got {self.template!r}")

    @abstractmethod
    def draw(self, rng: random.Random) -> Content:
        """One problem's content, of any split."""

    def sample(self, rng: random.Random) -> Problem:
        while True:
            content = self.draw(rng)
            if zlib.crc32(f"{self.name}/{content.key}".encode()) % 10 in SPLITS[self.split]:
                break
        chosen = rng.randrange(len(self.TEMPLATES) - 1) if self.template is None else self.template
        prompt = self.TEMPLATES[chosen].format(**content.slots)
        return Problem(prompt, content.answer, content.response, {**content.metadata, "template": chosen})

    def phrased(self, template: str) -> WordedTask:
        return replace(self, template=int(template) if template.isdecimal() else template)  # type: ignore[arg-type]

    def easier(self, progress: float) -> WordedTask:
        """The task with the upper ends of its ranges, such as ``max_steps``, nearer to the lower ones."""
        ranges = {f.name[4:] for f in fields(self) if f.name.startswith("min_")}
        ends = {f"max_{r}": (getattr(self, f"min_{r}"), getattr(self, f"max_{r}")) for r in ranges}
        return replace(self, **{name: low + round((high - low) * progress) for name, (low, high) in ends.items()})

    def held_out(self, key: str) -> Problem:
        return replace(self, split="validation").sample(random.Random(key))

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        task = self if self.split == "train" else replace(self, split="train")
        return super(WordedTask, task).training_problems(seed, first, count)


def listed(items: Sequence[str]) -> str:
    """The items as a list in a sentence without its full stop: ``Ann, Ben, Tom``."""
    return ", ".join(items)


def items_of(completion: str) -> list[str] | None:
    """The items of a completion such as ``Ann, Ben, Tom.``; None if it is not written like that."""
    return completion[:-1].split(", ") if completion.endswith(".") else None
