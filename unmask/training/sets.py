"""What set policies learn from: states of decodes, a set tried in each, and which other proposals survive it.

A proposal of a state s *survives* a set S if a careful decode that goes on from s with S committed ends with that token
there. Neither answers nor a grader are needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.ops.reference.select_set import LEAST
from unmask.ops.state import REMAINING
from unmask.policies.base import Observation, UnmaskingPolicy
from unmask.policies.registry import make_policy
from unmask.policies.set_policy import SetInputs, SetPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import Sampler
from unmask.training.rollout import WideView
from unmask.training.set_config import SetTrainerConfig

CERTAIN = 0.97
"""Probability above which a proposal is in every set of a careful decode."""
PART = 1.4
"""A random part of a set keeps each position with probability min(u, 1), u even in (0, PART): 29 % keep all."""


@dataclass
class Tried:
    """M states, the set that was tried in each, and what became of the other proposals."""

    inputs: SetInputs
    picked: Tensor
    """(M, L) bool: the set."""
    survived: Tensor
    """(M, L) bool."""
    valid: Tensor
    """(M, L) bool: had a proposal that is not in the set."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, which :meth:`of` reads."""
        own = {name: getattr(self, name) for name in ("picked", "survived", "valid")}
        return {**vars(self.inputs), **own}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Tried:
        own = {name: tensors[name] for name in ("picked", "survived", "valid")}
        return cls(SetInputs(**{name: t for name, t in tensors.items() if name not in own}), **own)

    @staticmethod
    def join(parts: Sequence[Tried]) -> Tried:
        """Several as one."""
        every = [part.tensors() for part in parts]
        return Tried.of({name: torch.cat([tensors[name] for tensors in every]) for name in every[0]})


@torch.no_grad()
def finish(
    sampler: Sampler, tokens: Tensor, attention: Tensor | None, start: int, config: SamplerConfig
) -> tuple[Tensor, Tensor]:
    """Decode the active block of each row of ``tokens`` (N, T) to its end; the buffer begins at ``start``.

    Returns the buffer (N, L) int64 and where it is still masked (N, L) bool: behind an end of sequence, for instance.
    """
    state = sampler.new_state(tokens.clone(), attention, start, config)
    state.mask &= state.allowed  # later blocks cannot change this one
    state.rows[:, REMAINING] = state.mask.sum(dim=1)
    for _ in sampler.steps(state, config, share=True):
        pass
    state.raise_if_undefined()
    return state.buffer, state.buffer == state.mask_token_id


class SetCollector:
    """Decodes prompts carefully and by the policy itself, tries a set in each state, and labels it."""

    def __init__(self, model: Any, tokenizer: Any, policy: SetPolicy, config: SetTrainerConfig) -> None:
        """Raises ValueError for a careful rule that reads more than the policy, or revises tokens."""
        self.policy, self.config = policy, config
        rule = make_policy(config.careful)
        wide = WideView(rule, policy.num_confidences)
        wide.full_context = rule.full_context
        self.own, self.visits, self.careful = (self.sampler(model, tokenizer, p) for p in (policy, wide, rule))

    @staticmethod
    def sampler(model: Any, tokenizer: Any, policy: UnmaskingPolicy) -> Sampler:
        return Sampler(model, tokenizer, policy, SamplerConfig())

    def collect(self, ids: list[list[int]], iteration: int) -> tuple[Tried, dict[str, float]]:
        """The states of one round on prompts ``ids``, and numbers for the log."""
        c, rng = self.config, random.Random(f"sets/{self.config.seed}/{iteration}")
        config = SamplerConfig(
            max_new_tokens=rng.choice(c.max_completion_length),
            block_length=rng.choice(c.block_length),
            temperature=rng.choice(c.temperature),
            actions="greedy",
            seed=rng.getrandbits(62),
            max_batch_size=c.rollout_batch_size,
        )
        draws = torch.Generator().manual_seed(rng.getrandbits(62))
        learned = iteration >= c.careful_iterations
        own = len(ids) // 2 if learned else 0
        parts, numbers = [], {}
        for sampler, rows in ((self.own, ids[:own]), (self.visits, ids[own:])):
            if rows:
                part, steps = self.visited(sampler, rows, config, draws, learned)
                parts.append(part)
                numbers["own_nfe" if sampler is self.own else "careful_nfe"] = steps
        tried = Tried.join(parts)
        survived = tried.survived[tried.valid].float().mean().item()
        return tried, {"states": float(len(tried.picked)), "survived": survived, **numbers}

    def visited(
        self, sampler: Sampler, ids: list[list[int]], config: SamplerConfig, draws: torch.Generator, learned: bool
    ) -> tuple[Tried, float]:
        """Labelled states of decodes of ``ids`` by ``sampler``, and how many forwards these took on average."""
        recorded = replace(config, record=True)
        own = sampler.policy.conditioned
        risks = self.risks(len(ids), draws).to(sampler.model.device) if own else None
        whole = sampler.prepare(ids, None, recorded, None, risks)
        kept: list[dict[str, Tensor]] = []
        for record in sampler.steps(whole, recorded):
            o = record.observation
            picked = record.rank >= 0 if own else self.sets(o, draws, learned)
            picked = picked & o.allowed & self.part(o.mask, draws)
            valid = o.allowed & ~picked
            live = record.took & valid.any(dim=1)
            row = {"picked": picked, "valid": valid, "rows": record.rows, "before": o.tokens, **vars(SetInputs.of(o))}
            kept.append({name: value[live] for name, value in row.items()})
        states = {name: torch.cat([row[name] for row in kept]) for name in kept[0]}
        most = -(-self.config.max_states * len(ids) // self.config.num_prompts)
        index = torch.randperm(len(states["rows"]), generator=draws)[:most].sort().values.to(whole.tokens.device)
        states = {name: value[index] for name, value in states.items()}
        rows, before = states.pop("rows"), states.pop("before")
        tokens = whole.tokens[rows]
        tokens[:, whole.start :] = torch.where(states["picked"], states["tokens"], before)
        attention = None if whole.attention is None else whole.attention[rows]
        final, still = finish(self.careful, tokens, attention, whole.start, config)
        ends = torch.isin(states["tokens"], torch.tensor(whole.end_ids, dtype=torch.int64, device=final.device))
        states["survived"] = torch.where(still, ends, final == states["tokens"])
        return Tried.of(states), whole.steps.float().mean().item()

    def sets(self, o: Observation, draws: torch.Generator, learned: bool) -> Tensor:
        """(B, L) bool: sets for states of careful decodes; half are the policy's if it has ``learned``."""
        batch, device = len(o.mask), o.mask.device
        p = o.token_confidence
        certain = o.allowed & (p > CERTAIN)
        spread = 2 * torch.rand(batch, 1, generator=draws)
        noise = -torch.empty(p.shape).exponential_(generator=draws).clamp_min(LEAST).log() * spread
        score = (p.clamp_min(LEAST).log() + noise.to(device)).masked_fill(~o.allowed | certain, -math.inf)
        rank = score.argsort(dim=1, descending=True).argsort(dim=1)
        count = torch.randint(0, self.config.extra + 1, (batch, 1), generator=draws).to(device)
        sets = certain | (o.allowed & (rank < count))
        if not learned:
            return sets
        mine = self.policy.decide(replace(o, alpha=self.risks(batch, draws).to(device))).select
        assert mine is not None
        return torch.where(torch.rand(batch, 1, generator=draws).to(device) < 0.5, mine, sets)

    def part(self, like: Tensor, draws: torch.Generator) -> Tensor:
        """(B, L) bool: the random part of a set that is tried."""
        cut = PART * torch.rand(len(like), 1, generator=draws)
        return (torch.rand(like.shape, generator=draws) < cut).to(like.device)

    def risks(self, count: int, draws: torch.Generator) -> Tensor:
        """(count,) float32, even in their logarithm."""
        low, high = map(math.log, self.config.risks)
        return (low + (high - low) * torch.rand(count, generator=draws)).exp()
