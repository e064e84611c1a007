"""What policies learn from without rewards: states of decodes, and which of their proposals are to be trusted.

A proposal of a state s *survives* a set S if a careful decode that goes on from s with S committed ends with that token
there. It *agrees* if one careful decode of the whole prompt does. Neither answers nor a grader are needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.ops.reference.select_set import LEAST, prior_logit
from unmask.ops.state import REMAINING
from unmask.policies.base import Observation
from unmask.policies.learned import Policy
from unmask.policies.registry import make_policy
from unmask.policies.set_policy import SetInputs, SetPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.infill import by_value, parts_of
from unmask.sampling.sampler import Sampler
from unmask.sampling.state import State
from unmask.tasks.base import Holes, Problem
from unmask.training.rollout import WideView
from unmask.training.supervised_config import SupervisedConfig

CERTAIN = 0.97
"""Probability above which a proposal is in every set of a careful decode."""
PART = 1.4
"""A random part of a set keeps each position with probability min(u, 1), u even in (0, PART): 29 % keep all."""


@dataclass
class SingleInputs:
    """What a policy of single positions reads of M states of L positions; all states are of one block length."""

    mask: Tensor
    """(M, L) bool: masked."""
    confidence: Tensor
    """(M, L, k) float32, as :attr:`Observation.drawn`."""
    time: Tensor
    """(M,) float32."""
    allowed: Tensor
    """(M, L) bool: masked and in the active block."""
    phase: Tensor
    """(M,) int64: where in a block the buffer begins."""
    blocks: Tensor
    """(M,) int64: tokens per block."""

    @classmethod
    def of(cls, o: Observation) -> SingleInputs:
        """The inputs of one step."""
        phase = torch.zeros_like(o.steps) if o.phase is None else o.phase
        length = min(o.block_length, o.length) if o.phase is None else o.block_length
        region = o.allowed if o.region is None else o.region
        return cls(o.mask, o.drawn.nan_to_num(0.0), o.time, region, phase, torch.full_like(phase, length))

    @property
    def prior(self) -> Tensor:
        """(M, L): logit of the proposal's probability."""
        return prior_logit(self.confidence[..., 0])


Inputs = SetInputs | SingleInputs
OWN = ("turn", "survived", "valid", "missing", "model")
"""The tensors of a :class:`Tried` beside its inputs."""


@dataclass
class Tried:
    """M states, the set that was tried in each, and what became of the other proposals."""

    inputs: Any
    """:data:`Inputs`."""
    turn: Tensor
    """(M, L) int64: 0 outside the set, else which run of the network picked it, or 1 where that is not known."""
    survived: Tensor
    """(M, L) bool: the label."""
    valid: Tensor
    """(M, L) bool: has a label."""
    missing: Tensor
    """(M,) int64: positions on the left that a state, of a shorter text with holes, does not have."""
    model: Tensor
    """(M,) int64: the number of the language model."""

    @property
    def picked(self) -> Tensor:
        """(M, L) bool: the set."""
        return self.turn > 0

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, which :meth:`of` reads."""
        return {**vars(self.inputs), **{name: getattr(self, name) for name in OWN}}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], kind: type[Inputs]) -> Tried:
        inputs = kind(**{name: tensor for name, tensor in tensors.items() if name not in OWN})
        return cls(inputs, **{name: tensors[name] for name in OWN})

    @staticmethod
    def join(parts: Sequence[Tried]) -> Tried:
        """Several as one."""
        width = max(part.turn.shape[1] for part in parts)
        every = [part.widened(width).tensors() for part in parts]
        joined = {name: torch.cat([tensors[name] for tensors in every]) for name in every[0]}
        return Tried.of(joined, type(parts[0].inputs))

    def widened(self, width: int) -> Tried:
        """With ``width`` positions: zeros on the left."""
        if (more := width - self.turn.shape[1]) == 0:
            return self
        wide = {}
        for name, t in self.tensors().items():
            wide[name] = t if t.ndim < 2 else torch.cat((t.new_zeros(len(t), more, *t.shape[2:]), t), dim=1)
        return Tried.of({**wide, "missing": self.missing + more}, type(self.inputs))

    def take(self, rows: Tensor, pad: int = 0) -> Tried:
        """The states ``rows``, without their first ``pad`` positions."""
        tensors = {n: t[rows] if t.ndim < 2 else t[rows, pad:] for n, t in self.tensors().items()}
        return Tried.of(tensors, type(self.inputs))

    def alike(self, index: Tensor) -> list[Tried]:
        """The states at ``index``, those that have equally many positions together, without the missing ones."""
        return [self.take(index[places], pad) for pad, places in by_value(self.missing[index])]


@torch.no_grad()
def finish(sampler: Sampler, tokens: Tensor, attention: Tensor | None, start: int, config: SamplerConfig) -> Tensor:
    """Decode the active block of each row of ``tokens`` (N, T) to its end; the buffer begins at ``start``.

    Returns the buffer (N, L) int64, which may still have masks: behind an end of sequence, for instance.
    """
    state = sampler.new_state(tokens.clone(), attention, start, config)
    state.mask &= state.allowed  # later blocks cannot change this one
    state.rows[:, REMAINING] = state.mask.sum(dim=1)
    return decoded(sampler, state, config)


def decoded(sampler: Sampler, state: State, config: SamplerConfig) -> Tensor:
    """(N, L) int64: the buffer of ``state`` after its last step."""
    for _ in sampler.steps(state, config, share=True):
        pass
    state.raise_if_undefined()
    return state.buffer


def matching(final: Tensor, said: Tensor, state: State) -> Tensor:
    """(M, L) bool: where ``said`` is the token of ``final``, or an end of sequence where that is still masked."""
    ends = torch.isin(said, torch.tensor(state.end_ids, dtype=torch.int64, device=said.device))
    return torch.where(final == state.mask_token_id, ends, final == said)


def by_length(ids: Sequence[Any]) -> list[list[int]]:
    """Places in ``ids`` in groups: of one length if they are :class:`unmask.tasks.Holes`, of prompts all."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(ids):
        groups.setdefault(len(row) if isinstance(row, Holes) else 0, []).append(place)
    return list(groups.values())


class Collector:
    """Decodes prompts carefully and by the policy itself, and labels the proposals of the states that it meets.

    Where survival is the label, a set is tried in each state. Its proposals are committed and have no label.
    """

    def __init__(
        self, model: Any, tokenizer: Any, policy: SetPolicy | Policy, config: SupervisedConfig, number: int = 0
    ) -> None:
        """``number`` is the model's.

        Raises ValueError for a policy of single positions that is conditioned on alpha, of which labels know nothing,
        and for a careful rule that reads more than the policy.
        """
        if policy.conditioned and policy.dial != "alpha":
            raise ValueError("the policy is conditioned on alpha, which these labels do not depend on: take another")
        self.policy, self.config, self.number = policy, config, number
        self.kind: type[Inputs] = SetInputs if isinstance(policy, SetPolicy) else SingleInputs
        self.alone = config.labels == "agreement" and self.kind is SingleInputs
        """Whether no sets are tried, as neither label nor policy depends on them."""
        rule = make_policy(config.careful)
        used = (policy, WideView(rule, policy), rule)
        self.own, self.visits, self.careful = (Sampler(model, tokenizer, p, SamplerConfig()) for p in used)

    def collect(
        self, ids: list[Any], iteration: int, problems: Sequence[Problem] = ()
    ) -> tuple[Tried, dict[str, float]]:
        """The states of one round on ``ids``, of prompts or :class:`unmask.tasks.Holes`, and numbers for the log.

        ``problems``, to which the prompts belong, are for labels that need answers.
        """
        config, draws = self.drawn(iteration)
        learned = iteration >= self.config.careful_iterations
        own = len(ids) // 2 if learned else 0
        parts, numbers = [], {}
        for sampler, rows in ((self.own, ids[:own]), (self.visits, ids[own:])):
            nfe = 0.0
            for group in by_length(rows):
                part, steps = self.visited(sampler, [rows[i] for i in group], config, draws, learned)
                parts.append(part)
                nfe += steps * len(group) / len(rows)
            if rows:
                numbers["own_nfe" if sampler is self.own else "careful_nfe"] = nfe
        tried = Tried.join(parts)
        survived = tried.survived[tried.valid].float().mean().item()
        return tried, {"states": float(len(tried.picked)), "survived": survived, **numbers}

    def drawn(self, iteration: int) -> tuple[SamplerConfig, torch.Generator]:
        """How prompts are decoded in a round, and what draws all else."""
        rng = random.Random(f"sets/{self.config.seed}/{iteration}")
        config = SamplerConfig(
            **self.config.drawn(rng).decoded,
            actions="greedy",
            seed=rng.getrandbits(62),
            max_batch_size=self.config.rollout_batch_size,
        )
        return config, torch.Generator().manual_seed(rng.getrandbits(62))

    def some(self, states: int, share: float, draws: torch.Generator) -> Tensor:
        """(K,) int64: the places of states to learn from, where ``share`` of a round's prompts led to these."""
        most = math.ceil(self.config.max_states * share)
        return torch.randperm(states, generator=draws)[:most].sort().values.to(self.own.model.device)

    def visited(
        self, sampler: Sampler, ids: list[Any], config: SamplerConfig, draws: torch.Generator, learned: bool
    ) -> tuple[Tried, float]:
        """Labelled states of decodes of ``ids`` by ``sampler``, and how many forwards these took on average."""
        recorded, own = replace(config, record=True), sampler is self.own
        whole = parts_of(sampler, ids, recorded)[0].state
        if own:
            for name, value in self.dialled(len(ids), draws).items():
                setattr(whole, name, value)
        kept: list[dict[str, Tensor]] = []
        for record in sampler.steps(whole, recorded):
            o, before = record.observation, record.observation.tokens
            assert before is not None
            picked = record.rank >= 0 if own else self.sets(o, draws, learned)
            picked = picked & o.allowed & self.part(o.mask, draws)
            if self.alone:
                picked = torch.zeros_like(picked)
            row = {"picked": picked, "valid": o.allowed & ~picked, "rows": record.rows, "before": before}
            row |= {"said": torch.where(o.allowed, o.candidates, before), **vars(self.kind.of(o))}
            live = record.took & row["valid"].any(dim=1)
            kept.append({name: value[live] for name, value in row.items()})
        whole.raise_if_undefined()
        states = {name: torch.cat([row[name] for row in kept]) for name in kept[0]}
        if self.config.labels == "agreement":
            final = decoded(self.careful, parts_of(self.careful, ids, config)[0].state, config) if own else whole.buffer
            agree = matching(final[states["rows"]], states["said"], whole)
            states["survived"], on_the_way = agree, (agree | (states["mask"] & ~states["picked"])).all(dim=1)
            states = {name: value[on_the_way] for name, value in states.items()}
        index = self.some(len(states["rows"]), len(ids) / self.config.num_prompts, draws)
        states = {name: value[index] for name, value in states.items()}
        rows, before, said = (states.pop(name) for name in ("rows", "before", "said"))
        if self.config.labels == "survival":
            tokens = whole.tokens[rows]
            tokens[:, whole.start :] = torch.where(states["picked"], said, before)
            attention = None if whole.attention is None else whole.attention[rows]
            config = replace(config, stop_at_eos=not whole.infill)
            final = finish(self.careful, tokens, attention, whole.start, config)
            states["survived"] = matching(final, said, whole)
        states |= {"missing": torch.zeros_like(rows), "model": torch.full_like(rows, self.number)}
        states["turn"] = states.pop("picked").long()
        return Tried.of(states, self.kind), whole.steps.float().mean().item()

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
        decision: Any = self.policy.decide(replace(o, **self.dialled(batch, draws)))
        mine = decision.logits > 0 if decision.select is None else decision.select
        return torch.where(torch.rand(batch, 1, generator=draws).to(device) < 0.5, mine, sets)

    def part(self, like: Tensor, draws: torch.Generator) -> Tensor:
        """(B, L) bool: the random part of a set that is tried."""
        cut = PART * torch.rand(len(like), 1, generator=draws)
        return (torch.rand(like.shape, generator=draws) < cut).to(like.device)

    def dialled(self, count: int, draws: torch.Generator) -> dict[str, Any]:
        """A random value of the policy's dial for each of ``count`` rows, as states and observations have it."""
        value = self.config.dials(torch.rand(count, generator=draws)).to(self.own.model.device)
        return {"alpha": value} if self.policy.dial == "alpha" else {"shift": value[:, None]}
