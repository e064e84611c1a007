"""``sudoku``: 4 x 4 sudoku, whose cells can be filled in any order; some orders are easier."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from unmask.tasks.base import Problem, Task
from unmask.tasks.constrained import Clues, squares


@cache
def grids() -> tuple[str, ...]:
    """All 288 valid grids, 16 digits each, row by row."""
    return tuple("".join("1234"[i] for row in square for i in row) for square in squares(4, boxes=True))


@dataclass(frozen=True)
class Sudoku(Task):
    """Prompt: the grid row by row with ``.`` for blanks, then ``=``; response: the whole grid.

    ``min_clues`` to ``max_clues`` cells are shown. A puzzle may have several solutions; any one that keeps the
    clues is correct.
    """

    min_clues: Clues = 4
    max_clues: Clues = 8
    name: str = "sudoku"

    def sample(self, rng: random.Random) -> Problem:
        grid = rng.choice(grids())
        shown = set(rng.sample(range(16), rng.randint(self.min_clues, self.max_clues)))
        prompt = "".join(c if i in shown else "." for i, c in enumerate(grid)) + "="
        return Problem(prompt, grid, grid, {"clues": len(shown)})

    def grade(self, problem: Problem, completion: str) -> float:
        clues = zip(problem.prompt[:-1], completion, strict=False)
        return float(completion in grids() and all(clue in (".", cell) for clue, cell in clues))
