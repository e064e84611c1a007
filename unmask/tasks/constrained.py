"""``line``, ``letters``, ``latin`` and ``grid``: many right answers, whose parts constrain each other.

``line``: a waiting line of people to reverse, sort, shuffle or change. ``Line: Tom, Ann, Eve. Put Kim somewhere in the
line.`` may be answered ``Tom, Kim, Ann, Eve.`` ``letters``: different words by their first letters. ``Name animals that
begin with b, c, b.`` may be answered ``bear, cat, bee.`` ``latin`` and ``grid``: squares to complete from a few clues,
row behind row. ``Sudoku: 1 _ _ _ / _ _ _ _ / _ _ _ _ / _ _ _ 1`` may be answered
``1 2 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1``. Each part may look right by itself and be wrong beside another that is
committed in the same step.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Annotated

from pydantic import Field

from unmask.tasks.base import Problem
from unmask.tasks.words import ANIMALS, COLOURS, FOODS, NAMES, Content, WordedTask, items_of, listed

People = Annotated[int, Field(ge=2, le=len(NAMES) - 1)]
Words = Annotated[int, Field(ge=1, le=12)]
"""Of each kind there are six first letters at least that several words begin with."""
Clues = Annotated[int, Field(ge=0, le=16)]
ORDERS = {
    "copy": "Write down the line",
    "reverse": "Reverse the line",
    "sort": "Sort the line by name",
    "shuffle": "Shuffle the line",
    "insert": "Put {person} somewhere in the line",
    "remove": "Remove one person from the line",
    "replace": "Replace one person by {person}",
    "first": "Put {person} first",
    "without": "Remove {person} from the line",
}


def right_lines(order: str, people: list[str], person: str) -> list[list[str]]:
    """All lines that ``people`` may form after ``order``, which may name a ``person``; not for a shuffle."""
    places = range(len(people))
    return {
        "copy": [people],
        "reverse": [people[::-1]],
        "sort": [sorted(people)],
        "insert": [people[:i] + [person] + people[i:] for i in (*places, len(people))],
        "remove": [people[:i] + people[i + 1 :] for i in places],
        "replace": [people[:i] + [person] + people[i + 1 :] for i in places],
        "first": [[person, *people]],
        "without": [[p for p in people if p != person]],
    }[order]


@dataclass(frozen=True)
class Line(WordedTask):
    """Lines of ``min_people`` to ``max_people``; ``order`` is one of ``ORDERS``, None any of them.

    A problem's answer is one right line; :meth:`grade` takes all.
    """

    TEMPLATES = (
        "Line: {people}. {order}.",
        "{order}: {people}.",
        "{order}. The line is {people}.",
        "People wait in a line: {people}. {order}.",
        "The line is {people}. {order}.",
    )
    min_people: People = 3
    max_people: People = 8
    order: str | None = None
    name: str = "line"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order is not None and self.order not in ORDERS:
            raise ValueError(f"order must be None or one of {', '.join(ORDERS)}, got {self.order!r}")

    def draw(self, rng: random.Random) -> Content:
        count = rng.randint(self.min_people, self.max_people)
        order = self.order or rng.choice(list(ORDERS))
        person, *people = rng.sample(NAMES, count + 1)
        if order == "without":
            person = rng.choice(people)
        if order == "shuffle":
            line = people
            while line == people:
                line = rng.sample(people, count)
        else:
            line = rng.choice(right_lines(order, people, person))
        slots = {"people": listed(people), "order": ORDERS[order].format(person=person)}
        answer = listed(line) + "."
        metadata = {"order": order, "people": people, "person": person}
        return Content(f"{slots['order']}: {slots['people']}", slots, answer, answer, metadata)

    def grade(self, problem: Problem, completion: str) -> float:
        line, people = items_of(completion), problem.metadata["people"]
        if problem.metadata["order"] == "shuffle":
            return float(line is not None and line != people and sorted(line) == sorted(people))
        return float(line in right_lines(problem.metadata["order"], people, problem.metadata["person"]))


KINDS = {"animals": ANIMALS, "foods": FOODS, "people": NAMES}


@dataclass(frozen=True)
class Letters(WordedTask):
    """``min_words`` to ``max_words`` letters, some of them several times."""

    TEMPLATES = (
        "Name {kind} that begin with {letters}.",
        "First letters: {letters}. Name different {kind}.",
        "List {kind}, none of them twice, by their first letters: {letters}.",
        "{letters}: which {kind} begin so?",
        "List different {kind} that begin with {letters}.",
    )
    min_words: Words = 2
    max_words: Words = 10
    name: str = "letters"

    def draw(self, rng: random.Random) -> Content:
        kind = rng.choice(list(KINDS))
        count = rng.randint(self.min_words, self.max_words)
        begun = Counter(word[0] for word in KINDS[kind])
        some = rng.sample([c for c, words in begun.items() if words > 1], max(2, (count + 1) // 2))
        words = rng.sample([word for word in KINDS[kind] if word[0] in some], count)
        slots = {"kind": kind, "letters": listed([word[0].lower() for word in words])}
        answer = listed(words) + "."
        return Content(f"{kind} {slots['letters']}", slots, answer, answer, {"kind": kind, "letters": slots["letters"]})

    def grade(self, problem: Problem, completion: str) -> float:
        words, kind = items_of(completion), KINDS[problem.metadata["kind"]]
        if words is None or any(word not in kind for word in words) or len(set(words)) < len(words):
            return 0.0
        return float(listed([word[0].lower() for word in words]) == problem.metadata["letters"])


Square = tuple[tuple[int, ...], ...]


def is_square(rows: Square, boxes: bool) -> bool:
    """Whether the numbers 0 to size - 1 stand once in each row, column and, with ``boxes``, 2 by 2 box of four."""
    numbers = list(range(len(rows)))
    parts = [*rows, *zip(*rows, strict=False)]
    if boxes:
        parts += [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    return all(sorted(part) == numbers for part in parts) and len(parts[0]) == len(rows)


@cache
def squares(size: int, boxes: bool) -> list[Square]:
    """All squares of a size up to 4: 576 of 4 by 4, 288 with boxes."""
    grown: list[Square] = [()]
    for _ in range(size):
        grown = [
            (*square, row)
            for square in grown
            for row in permutations(range(size))
            if all(len(set(column)) == len(column) for column in zip(*square, row, strict=True))
        ]
    return [square for square in grown if is_square(square, boxes)]


@dataclass(frozen=True)
class Latin(WordedTask):
    """Squares of ``min_size`` to ``max_size`` colours with ``min_clues`` to ``max_clues`` cells shown."""

    TEMPLATES = (
        "Fill the square with {symbols}, each once in every row and column: {square}",
        "Square: {square}. Use {symbols}, none of them twice in a row or column.",
        "Use {symbols}, each once in every row and column, in the square {square}",
        "Complete the square {square}. Every row and column has {symbols}.",
        "Complete the square: {square}. Use {symbols}, each once in every row and column.",
    )
    min_size: Annotated[int, Field(ge=2, le=4)] = 3
    max_size: Annotated[int, Field(ge=2, le=4)] = 4
    min_clues: Clues = 0
    max_clues: Clues = 5
    name: str = "latin"

    def symbols(self, rng: random.Random, size: int) -> list[str]:
        return rng.sample(COLOURS, size)

    def draw(self, rng: random.Random) -> Content:
        size, boxes = rng.randint(self.min_size, self.max_size), isinstance(self, Grid)
        symbols = self.symbols(rng, size)
        rows = [[symbols[i] for i in row] for row in rng.choice(squares(size, boxes))]
        cells = size * size
        shown = rng.sample(range(cells), rng.randint(min(self.min_clues, cells), min(self.max_clues, cells)))
        clues = [[c if size * i + j in shown else "_" for j, c in enumerate(row)] for i, row in enumerate(rows)]
        square, answer = (" / ".join(" ".join(row) for row in cells) for cells in (clues, rows))
        slots = {"symbols": f"{listed(symbols[:-1])} and {symbols[-1]}", "square": square}
        return Content(f"{symbols} {square}", slots, answer, answer, {"clues": clues, "symbols": symbols})

    def grade(self, problem: Problem, completion: str) -> float:
        clues, symbols = problem.metadata["clues"], problem.metadata["symbols"]
        rows = [row.split(" ") for row in completion.split(" / ")]
        if [len(row) for row in rows] != [len(row) for row in clues] or not {c for row in rows for c in row} <= {
            *symbols
        }:
            return 0.0
        kept = all(clue in ("_", c) for pair in zip(clues, rows, strict=True) for clue, c in zip(*pair, strict=True))
        square = tuple(tuple(symbols.index(cell) for cell in row) for row in rows)
        return float(kept and is_square(square, isinstance(self, Grid)))


@dataclass(frozen=True)
class Grid(Latin):
    """4 by 4 sudoku with ``min_clues`` to ``max_clues`` clues, fewer than what would fix the solution."""

    TEMPLATES = (
        "Sudoku: {square}",
        "Solve this sudoku of 4 by 4: {square}",
        "{square} is a sudoku. Complete it.",
        "Fill the sudoku {square}",
        "Complete the sudoku: {square}",
    )
    min_size: Annotated[int, Field(ge=4, le=4)] = 4
    min_clues: Clues = 1
    name: str = "grid"

    def symbols(self, rng: random.Random, size: int) -> list[str]:
        return ["1", "2", "3", "4"]
