"""``hops``: follow the arrows to the end of a chain, hop by hop or in one step, which is often wrong.

Prompt ``cEaCfBeG:a=``: each pair is an arrow from a node (lower case) to the next (upper case), in no order;
after the colon stands the node to start from. Careful response ``aCcEeG#G``: the arrows in the order they are
followed, then the last node after ``#``. A share of the training responses is the short cut ``#G``. One hop is
a look-up. A small model cannot do many hops at once, nor predict the length of the chain. If the short cut, or
the end of sequence that follows it, is committed before the hops, the answer is a guess. So the order of unmasking
decides it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from unmask.config import Chance, PositiveInt, require
from unmask.tasks.base import Problem, Task

NODES = "abcdefghijklmnop"


@dataclass(frozen=True)
class Hops(Task):
    """Chains of ``min_hops`` to ``max_hops`` arrows among ``nodes`` nodes; the other nodes form chains of their own.

    ``shortcut`` is the share of responses that skip the hops; it shapes training data, not grading.
    """

    nodes: Annotated[int, Field(ge=2, le=len(NODES))] = 12
    min_hops: PositiveInt = 4
    max_hops: PositiveInt = 7
    shortcut: Chance = 0.4
    name: str = "hops"

    def __post_init__(self) -> None:
        require(self.max_hops < self.nodes, f"hops: max_hops={self.max_hops} must be less than nodes={self.nodes}")

    def sample(self, rng: random.Random) -> Problem:
        hops = rng.randint(self.min_hops, self.max_hops)
        order = rng.sample(NODES[: self.nodes], self.nodes)
        chains, rest = [order[: hops + 1]], order[hops + 1 :]
        while len(rest) >= 2:
            size = rng.randint(2, len(rest)) if len(rest) < 6 else rng.randint(2, len(rest) - 2)
            chains.append(rest[:size])
            rest = rest[size:]
        arrows = [a + b.upper() for chain in chains for a, b in pairwise(chain)]
        walked, answer = arrows[:hops], chains[0][-1].upper()
        rng.shuffle(arrows)
        skips = rng.random() < self.shortcut
        response = ("" if skips else "".join(walked)) + f"#{answer}"
        prompt = "".join(arrows) + f":{order[0]}="
        return Problem(prompt, answer, response, {"hops": hops, "reasons": not skips})

    def easier(self, progress: float) -> Hops:
        nodes = 3 + round((self.nodes - 3) * progress)
        low = min(self.min_hops, max(1, nodes // 2 - 1))
        return replace(self, nodes=nodes, min_hops=low, max_hops=max(low, min(self.max_hops, nodes - 4)))

    def grade(self, problem: Problem, completion: str) -> float:
        _, found, answer = completion.rpartition("#")
        return float(bool(found) and answer == problem.answer)

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """``reasons``: whether the completion follows the chain and does not begin with its end."""
        return {"reasons": float(not completion.startswith("#"))}
