"""``quiz``, ``form`` and ``gaps``: parts that do not depend on each other, so that all may be answered at once.

``quiz``: several small questions, answered ``1: 7. 2: cold.`` ``form``: facts about a person, of which some go in a
form, ``Name: Ann. Age: 7.`` ``gaps``: a series with holes, answered in full.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from unmask.tasks.base import Problem
from unmask.tasks.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    SHE,
    Content,
    Parts,
    WordedTask,
    listed,
)

PAIRS = {
    "opposite of": "hot cold, big small, old young, fast slow, day night, up down, wet dry, full empty, rich poor, "
    "left right, open closed, light dark, hard soft, early late, good bad, long short",
    "baby of a": "cow calf, cat kitten, dog puppy, sheep lamb, horse foal, goat kid, bear cub, hen chick, deer fawn",
    "home of a": "bird nest, bee hive, dog kennel, pig sty, horse stable, lion den, fish water, rabbit hole",
    "colour of": "grass green, snow white, blood red, coal black, sky blue, sun yellow, earth brown, fog grey",
}
FACTS = {pair: dict(words.split() for words in text.split(", ")) for pair, text in PAIRS.items()}

FIELDS = {
    "Age": ("{who} is {} years old.", [str(n) for n in range(5, 60)]),
    "City": ("{who} lives in {}.", CITIES),
    "Hobby": ("{who} likes {}.", HOBBIES),
    "Job": ("{who} works as a {}.", JOBS),
    "Pet": ("{who} has a {}.", [animal for animal in ANIMALS if animal[0] not in "aeo"]),
    "Food": ("{who} eats {}.", FOODS),
    "Colour": ("{who} wears {}.", COLOURS),
    "Friend": ("{who} knows {}.", NAMES),
}


Fields = Annotated[int, Field(ge=1, le=1 + len(FIELDS))]
Numbers = Annotated[int, Field(ge=2, le=60)]


class Exact(WordedTask):
    """A task whose only right completion is the answer."""

    def grade(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)


def question(rng: random.Random) -> tuple[str, int | str]:
    """A small question and its answer."""
    kind = rng.choice(["sum", "difference", "more", "less", *FACTS])
    if kind in FACTS:
        asked, answer = rng.choice(list(FACTS[kind].items()))
        return f"{kind} {asked}", answer
    a, b = rng.sample(range(1, 21), 2)
    if kind == "sum":
        return f"{a} + {b % 10}", a + b % 10
    if kind == "difference":
        return f"{max(a, b)} - {min(a, b)}", abs(a - b)
    return (f"more of {a} and {b}", max(a, b)) if kind == "more" else (f"less of {a} and {b}", min(a, b))


@dataclass(frozen=True)
class Quiz(Exact):
    """``min_questions`` to ``max_questions`` questions about numbers and words."""

    TEMPLATES = (
        "Answer all: {questions}",
        "{questions} Answer all of them.",
        "Here are {count} questions. {questions}",
        "Questions: {questions}",
        "Answer all questions: {questions}",
    )
    min_questions: Parts = 2
    max_questions: Parts = 12
    name: str = "quiz"

    def draw(self, rng: random.Random) -> Content:
        asked = [question(rng) for _ in range(rng.randint(self.min_questions, self.max_questions))]
        questions = " ".join(f"{i}: {q}?" for i, (q, _) in enumerate(asked, 1))
        answer = " ".join(f"{i}: {a}." for i, (_, a) in enumerate(asked, 1))
        return Content(questions, {"questions": questions, "count": str(len(asked))}, answer, answer)


@dataclass(frozen=True)
class Form(Exact):
    """Facts about one person in any order; ``min_fields`` to ``max_fields`` of them go in a form."""

    TEMPLATES = (
        "{facts} Fill the form: {fields}.",
        "Form: {fields}. {facts}",
        "Fill the form with {fields}. {facts}",
        "{facts} Write down {fields}.",
        "Write down {fields}. {facts}",
    )
    min_fields: Fields = 2
    max_fields: Fields = 9
    name: str = "form"

    def draw(self, rng: random.Random) -> Content:
        name = rng.choice(NAMES)
        values = {field: rng.choice(choices) for field, (_, choices) in FIELDS.items()}
        wanted = rng.sample(["Name", *FIELDS], rng.randint(self.min_fields, self.max_fields))
        told = [f for f in FIELDS if f in wanted or rng.random() < 0.3]
        rng.shuffle(told)
        pronoun = "She" if name in SHE else "He"
        facts = [FIELDS[f][0].format(values[f], who=pronoun if i else name) for i, f in enumerate(told)]
        answer = " ".join(f"{f}: {name if f == 'Name' else values[f]}." for f in wanted)
        slots = {"facts": " ".join(facts), "fields": listed(wanted)}
        return Content(str(slots), slots, answer, answer)


@dataclass(frozen=True)
class Gaps(Exact):
    """Series of ``min_numbers`` to ``max_numbers`` numbers with equal steps; about half of them are holes."""

    TEMPLATES = (
        "Fill the gaps: {series}.",
        "{series}: fill the gaps.",
        "Complete the series {series}.",
        "Which numbers are missing? {series}.",
        "Series: {series}. Fill the gaps.",
    )
    min_numbers: Numbers = 5
    max_numbers: Numbers = 12
    name: str = "gaps"

    def draw(self, rng: random.Random) -> Content:
        count, step = rng.randint(self.min_numbers, self.max_numbers), rng.choice([1, 2, 3, 4, 5])
        start = rng.randint(0, 59 - step * (count - 1)) if step * (count - 1) < 59 else 0
        numbers = [str(start + step * i) for i in range(count)]
        if rng.random() < 0.5:
            numbers.reverse()
        at = rng.randrange(count - 1)  # two neighbours are always shown
        series = [n if i in (at, at + 1) or rng.random() < 0.4 else "_" for i, n in enumerate(numbers)]
        answer = listed(numbers) + "."
        return Content(listed(series), {"series": listed(series)}, answer, answer)
