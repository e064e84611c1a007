"""A task of holes for the packaged model: a hop problem with its answer written out, and parts of that missing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.models import load_model, load_tokenizer
from unmask.tasks import Hops, Problem, Task

MASK = load_model("tiny").mask_token_id
TOKENIZER = load_tokenizer("tiny")


@dataclass(frozen=True)
class Gapped(Task):
    """``share`` of the answer's tokens are holes; the grade is the share of these that are filled as in the answer."""

    share: float = 0.8
    name: str = "gapped"

    def sample(self, rng: random.Random) -> Problem:
        hop = Hops(shortcut=0.0).sample(rng)
        prompt, answer = TOKENIZER.encode(hop.prompt), TOKENIZER.encode(hop.response)
        holes = [rng.random() < self.share for _ in answer]
        holes[rng.randrange(len(holes))] = True
        ids = prompt + [MASK if hole else token for token, hole in zip(answer, holes, strict=True)]
        return Problem(hop.prompt, hop.response, metadata={"ids": prompt + answer}, ids=ids)

    def grade(self, problem: Problem, completion: Sequence[int]) -> float:
        assert problem.ids is not None
        pairs = zip(problem.ids, completion, problem.metadata["ids"], strict=True)
        right = [filled == wanted for given, filled, wanted in pairs if given == MASK]
        return sum(right) / len(right)
