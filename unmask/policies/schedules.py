"""The schedule of SDAR and LLaDA2.0: a number of steps per block, in which sure tokens may go earlier."""

from __future__ import annotations

import math
from typing import ClassVar

from unmask.policies.heuristics import Heuristic, Parameter


class BlockSteps(Heuristic):
    """All more probable than LAMBDA if these are enough for STEPS steps per block, else as many of the best (SDAR).

    Step s of a block of BL tokens has to unmask n = BL // STEPS, one more while s < BL % STEPS, or all that are left.
    Upstream overwrites committed tokens where fewer than n are masked; this rule does not.
    """

    name = "block-steps"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("STEPS", int, 1, example=8),
        Parameter("LAMBDA", float, 0.0, 1.0, default=1.0, example=0.9),
    )
    rule = "block-steps"


class Sequential(BlockSteps):
    """As block-steps, but the first masked tokens from the left (SDAR's "sequential")."""

    name, order = "sequential", "place"
    parameters = (Parameter("STEPS", int, 1, example=8),)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.values[0], math.inf)
