"""``story`` and ``parcel``: answers that are reasoned out step by step or (wrongly, often) named at a glance.

``story``: ``Ann has 7 pears. She buys 5 more. She gives 3 to Tom. How many pears does Ann have now?`` The careful
response is ``7 + 5 = 12. 12 - 3 = 9. Answer: 9.`` ``parcel``: ``Tom gives to Eve. Ann gives to Tom. Ben gives to Kim.
Ann has the parcel. Who gets it in the end?`` Here it is ``Ann to Tom. Tom to Eve. Answer: Eve.`` A share of the
training responses is the short cut ``Answer: 9.`` Whoever commits it, or the end of sequence behind it, before the
steps has to do everything in one look: the order of unmasking decides the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from unmask.config import Chance
from unmask.tasks.base import Problem
from unmask.tasks.words import HE, NAMES, SHE, THINGS, Content, Parts, WordedTask


@dataclass(frozen=True)
class Reasoned(WordedTask):
    """``shortcut`` is the share of responses that skip the reasoning; it shapes training data, not grading."""

    shortcut: Chance = 0.3

    def grade(self, problem: Problem, completion: str) -> float:
        """Whether what stands between the last ``Answer:`` and a final full stop is right."""
        _, found, answer = completion.rpartition("Answer: ")
        return float(bool(found) and answer == f"{problem.answer}.")

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """``reasons``: whether the completion works the answer out rather than naming it."""
        return {"reasons": float(not completion.startswith("Answer"))}


Hands = Annotated[int, Field(ge=1, le=len(NAMES) - 1)]
Gifts = Annotated[int, Field(ge=1, le=len(NAMES) // 2)]
"""A gift beside the parcel's may take two people of its own."""
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {other}")
LOSSES = ("gives {n} to {other}", "loses {n}", "sells {n}")


@dataclass(frozen=True)
class Story(Reasoned):
    """``min_steps`` to ``max_steps`` gains and losses of at most 9, with up to ``max_result`` things at any time.

    ``asides`` is the share of stories with a sentence about somebody else's things.
    """

    TEMPLATES = (
        "{story} How many {things} does {name} have now?",
        "{story} Now {name} has how many {things}?",
        "How many {things} does {name} have in the end? {story}",
        "{story} Count the {things} that {name} has.",
        "Count the {things} that {name} has in the end. {story}",
    )
    min_steps: Parts = 1
    max_steps: Parts = 6
    max_result: Annotated[int, Field(ge=3)] = 30
    asides: Chance = 0.3
    name: str = "story"

    def draw(self, rng: random.Random) -> Content:
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        pronoun = "She" if name in SHE else "He"
        total = rng.randint(2, 12)
        facts, steps, numbers = [f"{name} has {total} {things}."], [], [total]
        for _ in range(rng.randint(self.min_steps, self.max_steps)):
            change = rng.choice([d for d in range(-9, 10) if d and 0 <= total + d <= self.max_result])
            event = rng.choice(GAINS if change > 0 else LOSSES)
            other = rng.choice([other for other in NAMES if other != name])
            numbers.append(change)
            facts.append(f"{pronoun} {event.format(n=abs(change), other=other)}.")
            steps.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}. ")
            total += change
        if rng.random() < self.asides:
            other = rng.choice(HE if name in SHE else SHE)
            facts.insert(rng.randint(0, len(facts)), f"{other} has {rng.randint(2, 12)} {rng.choice(THINGS)}.")
        reasons = rng.random() >= self.shortcut
        response = "".join(steps if reasons else []) + f"Answer: {total}."
        slots = {"story": " ".join(facts), "things": things, "name": name}
        return Content(f"{numbers}", slots, str(total), response, {"steps": len(steps), "reasons": reasons})


@dataclass(frozen=True)
class Parcel(Reasoned):
    """``min_hops`` to ``max_hops`` hands that the parcel goes through, among ``min_facts`` to ``max_facts`` in all."""

    TEMPLATES = (
        "{facts} {start} has the parcel. Who gets it in the end?",
        "{start} has the parcel. {facts} Who has it in the end?",
        "Who gets the parcel in the end? {start} has it now. {facts}",
        "{facts} The parcel starts with {start}. Where does it end?",
        "Who has the parcel in the end? {facts} It starts with {start}.",
    )
    min_hops: Hands = 1
    max_hops: Hands = 6
    min_facts: Gifts = 4
    max_facts: Gifts = 9
    name: str = "parcel"

    def draw(self, rng: random.Random) -> Content:
        hops = rng.randint(self.min_hops, self.max_hops)
        facts = rng.randint(max(self.min_facts, hops), max(self.max_facts, hops))
        people = rng.sample(NAMES, len(NAMES))
        chain, rest = people[: hops + 1], people[hops + 1 :]
        gifts, walked = list(pairwise(chain)), list(pairwise(chain))
        while len(gifts) < facts:  # other parcels, so that the end cannot be told by elimination
            size = min(rng.randint(1, 4), facts - len(gifts))
            gifts += pairwise(rest[: size + 1])
            rest = rest[size + 1 :]
        rng.shuffle(gifts)
        reasons = rng.random() >= self.shortcut
        response = "".join(f"{a} to {b}. " for a, b in walked if reasons) + f"Answer: {chain[-1]}."
        slots = {"facts": " ".join(f"{a} gives to {b}." for a, b in gifts), "start": chain[0]}
        return Content(str(slots), slots, chain[-1], response, {"hops": hops, "reasons": reasons})
