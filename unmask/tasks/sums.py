"""``sums``: chains of tagged additions and subtractions, solved step by step or in one step, which is often wrong.

Prompt ``2a+6b-7c+5=``, careful response ``a8b1c6#6``: each tag names the running result after the operation
that follows it in the prompt, and the answer comes after ``#``. A share of the training responses is the
short cut ``#6``. If the short cut, or the end of sequence that follows it, is committed before the reasoning, the
whole sum must be done at once. So the order of unmasking decides the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from unmask.config import Chance, PositiveInt
from unmask.tasks.base import Problem, Task

TAGS = "abcdefgh"
Operands = Annotated[int, Field(ge=1, le=len(TAGS) + 1)]


@dataclass(frozen=True)
class Sums(Task):
    """Chains of ``min_operands`` to ``max_operands`` digits whose running result stays in 0..``max_result``.

    ``shortcut`` is the share of responses that skip the reasoning; it shapes training data, not grading.
    """

    min_operands: Operands = 4
    max_operands: Operands = 8
    max_result: PositiveInt = 19
    shortcut: Chance = 0.4
    name: str = "sums"

    def sample(self, rng: random.Random) -> Problem:
        count = rng.randint(self.min_operands, self.max_operands)
        total = rng.randint(0, 9)
        prompt, steps = [str(total)], []
        for tag in TAGS[: count - 1]:
            signed = rng.choice([d for d in range(-9, 10) if d and 0 <= total + d <= self.max_result])
            total += signed
            prompt.append(f"{tag}{signed:+d}")
            steps.append(f"{tag}{total}")
        skips = rng.random() < self.shortcut
        response = ("" if skips else "".join(steps)) + f"#{total}"
        return Problem("".join(prompt) + "=", str(total), response, {"operands": count, "reasons": not skips})

    def easier(self, progress: float) -> Sums:
        most = 2 + round((self.max_operands - 2) * progress)
        return replace(self, min_operands=min(self.min_operands, most) if progress >= 1 else 2, max_operands=most)

    def grade(self, problem: Problem, completion: str) -> float:
        _, found, answer = completion.rpartition("#")
        return float(bool(found) and answer == problem.answer)

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """``reasons``: whether the completion begins with a running result rather than the answer."""
        return {"reasons": float(completion.startswith(TAGS[0]))}
