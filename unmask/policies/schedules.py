"""The schedule of SDAR and LLaDA2.0: a number of steps per block, in which sure tokens may go earlier."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from unmask.policies.base import Observation
from unmask.policies.heuristics import Heuristic, Parameter
from unmask.policies.selection import top, usable


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

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        least = top(score, self.quota(observation)) & usable(score)
        sure = score > self.values[1]
        return torch.where((sure.sum(1) >= least.sum(1))[:, None], sure, least)

    def quota(self, o: Observation) -> Tensor:
        """(B,) int64: how many positions each row has to unmask in this step."""
        share, longer = divmod(o.block_length, int(self.values[0]))
        return (share + (self._taken(o) < longer).long()).clamp_min(1)

    def _taken(self, o: Observation) -> Tensor:
        """(B,) int64: steps that each row has taken in its active block."""
        phase: int | Tensor = 0 if o.phase is None else o.phase
        region = o.allowed if o.region is None else o.region
        block = (region.to(torch.uint8).argmax(dim=1) + phase) // o.block_length
        memory = o.memory
        if "block_steps.block" not in memory or memory["block_steps.block"].shape != block.shape:
            memory["block_steps.block"], memory["block_steps.from"] = torch.full_like(block, -1), o.steps.clone()
        same = (memory["block_steps.block"] == block) & (o.steps > 0)
        # In place, because a captured graph reads and writes this memory.
        memory["block_steps.from"].copy_(torch.where(same, memory["block_steps.from"], o.steps))
        memory["block_steps.block"].copy_(block)
        return o.steps - memory["block_steps.from"]


class Sequential(BlockSteps):
    """As block-steps, but the first masked tokens from the left (SDAR's "sequential")."""

    name = "sequential"
    parameters = (Parameter("STEPS", int, 1, example=8),)

    def choose(self, observation: Observation, score: Tensor) -> Tensor:
        return top(score, self.quota(observation))

    def score(self, observation: Observation) -> Tensor:
        index = torch.arange(observation.length, device=observation.allowed.device)
        return -index.to(torch.float32).expand_as(observation.token_confidence)
