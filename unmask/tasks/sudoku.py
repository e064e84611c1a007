"""``sudoku``: 4 x 4 sudoku, whose cells can be filled in any order; some orders are easier."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from unmask.tasks.base import Problem, Task

ROWS = tuple("".join(p) for p in permutations("1234"))


def is_valid(grid: str) -> bool:
    """Whether ``grid`` (16 digits, row by row) has 1 to 4 once in each row, column and 2 x 2 box."""
    rows = [grid[i : i + 4] for i in range(0, 16, 4)]
    columns = [grid[i::4] for i in range(4)]
    boxes = [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    return len(grid) == 16 and all(sorted(part) == list("1234") for part in rows + columns + boxes)


@cache
def grids() -> tuple[str, ...]:
    """All 288 valid grids."""
    halves = [a + b for a in ROWS for b in ROWS if sorted(a[:2] + b[:2]) == sorted(a[2:] + b[2:]) == list("1234")]
    return tuple(top + bottom for top in halves for bottom in halves if is_valid(top + bottom))


@dataclass(frozen=True)
class Sudoku(Task):
    """Prompt: the grid row by row with ``.`` for blanks, then ``=``; response: the whole grid.

    ``min_clues`` to ``max_clues`` cells are shown. A puzzle may have several solutions; any one that keeps the
    clues is correct.
    """

    min_clues: int = 4
    max_clues: int = 8
    name: str = "sudoku"

    def sample(self, rng: random.Random) -> Problem:
        grid = rng.choice(grids())
        shown = set(rng.sample(range(16), rng.randint(self.min_clues, self.max_clues)))
        prompt = "".join(c if i in shown else "." for i, c in enumerate(grid)) + "="
        return Problem(prompt, grid, grid, {"clues": len(shown)})

    def grade(self, problem: Problem, completion: str) -> float:
        keeps = len(completion) == 16 and all(
            clue in (".", c) for clue, c in zip(problem.prompt[:-1], completion, strict=True)
        )
        return float(keeps and is_valid(completion))
