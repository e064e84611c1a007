"""The one generation loop. It yields a record of every step, from which results, streams and recordings are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.late import LateCopy
from unmask.sampling.state import PAUSED, RUNNING, State
from unmask.sampling.step import commit, observation, prepared
from unmask.sampling.stopping import StopWatch


@dataclass
class StepRecord:
    """One denoising step of the rows in the batch."""

    rows: Tensor
    """(R,) int64: the rows' numbers in the generation."""
    state: State
    """The rows after the step. The next step changes it in place."""
    observation: Observation
    """The policy's input: copies with ``record``, else views of the state."""
    rank: Tensor
    """(R, L) int32: -1 where nothing was committed, else 0, or for "dpls" the order of the draw."""
    finished: int
    """Rows of the generation that had left the batch before this step."""

    @property
    def took(self) -> Tensor:
        """(R,) bool: rows that took the step. The others were finished, or held for a refresh of the cache."""
        return self.state.steps > self.observation.steps

    @property
    def changed(self) -> Tensor:
        """(R,) bool: rows that took the step, got a seed, or had tokens that might be revised."""
        changed = self.took | (self.rank != -1).any(dim=1)
        editable = self.observation.editable
        return changed if editable is None else changed | editable.any(dim=1)


class Runner(Protocol):
    """Advances a batch of rows: :class:`Step`, or captured copies of it."""

    def enter(self, state: State) -> State:
        """Begin with these rows, also after a change of the rows. Returns the state that steps advance."""

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Keep rows ``keep`` (K,), in this order, then take ``fresh`` new ones; :meth:`enter` is called next."""

    def __call__(self, state: State) -> tuple[Observation, Tensor]:
        """Advance the rows by one step; returns the observation and the ranks (N, L)."""


class Step:
    """Advances any state by one step."""

    def __init__(self, forward: Forward, policy: UnmaskingPolicy, config: SamplerConfig) -> None:
        self.forward, self.policy, self.config = forward, policy, config

    def enter(self, state: State) -> State:
        return state

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        self.forward.rearrange(keep, fresh)

    def attach(self) -> None:
        """Give the policy its model: since the last step it may have had that of another Sampler."""
        self.policy.bare.attach(self.forward.model)

    def __call__(self, state: State) -> tuple[Observation, Tensor]:
        """One forward, one decision, one commit. A row that is held does not change."""
        self.attach()
        state = replace(state, ready=prepared(state, self.policy))
        seen = observation(self.forward(state), state, self.policy, self.config)
        held, seeding = self.forward.held(state), self.forward.seeding
        before = {} if held is None else {n: v.clone() for n, v in state.memory.items() if isinstance(v, Tensor)}
        decision = self.policy.decide(seen)
        if seeding is not None:
            return seen, self._seeded(state, seen, decision, seeding)
        if held is None:
            return seen, commit(state, seen, decision, self.config)
        for name, value in before.items():
            kept = held.view(-1, *(1,) * (value.ndim - 1))
            state.memory[name].copy_(torch.where(kept, value, state.memory[name]))
        return seen, self._commit(state, seen, decision, ~held)

    def _seeded(self, state: State, seen: Observation, decision: Decision, seeding: Tensor) -> Tensor:
        """Commit the seed of rows ``seeding`` (N,), and the decision elsewhere.

        The forward of a seed is no denoising step, and as in the models' own code it does not end a row.
        """
        rank = self._commit(state, seen, decision, ~seeding)
        state.steps.sub_(seeding.long())
        seeds = Decision(select=state.allowed & seeding[:, None])
        return torch.maximum(rank, self._commit(replace(state, stop_ids=()), seen, seeds, seeding))

    def _commit(self, state: State, seen: Observation, decision: Decision, taking: Tensor) -> Tensor:
        """Commit in the running rows among ``taking`` (N,); the others stay as they are."""
        waiting = ~taking & ~state.done
        state.status.masked_fill_(waiting, PAUSED)
        rank = commit(state, seen, decision, self.config)
        state.status.masked_fill_(waiting, RUNNING)
        return rank


@torch.no_grad()
def decode(
    whole: State, step: Runner, width: int | None = None, watch: StopWatch | None = None
) -> Iterator[StepRecord]:
    """Advance all rows of ``whole`` to their end, at most ``width`` of them at once (None: all).

    The next row replaces a finished one; without a next row, the batch shrinks. Rows are written back to ``whole``
    when they leave the batch, the last ones when the loop ends. ``watch`` ends rows that contain a stop string.
    """
    device = whole.tokens.device
    queue = (whole.status == RUNNING).nonzero().flatten().tolist()
    total = whole.rows.shape[0]
    width = min(width or len(queue), len(queue))
    numbers, queue = queue[:width], queue[width:]
    rows = torch.tensor(numbers, dtype=torch.int64, device=device)
    state, flags = step.enter(whole.take(rows)), LateCopy(late=device.type == "cuda")
    while numbers:
        seen, rank = step(state)
        if watch is not None:
            watch.look(numbers, state)
        yield StepRecord(rows, state, seen, rank, total - len(numbers) - len(queue))
        arrived = flags.swap(state.done)  # a row may take a step too many, which ops.unmask_ ignores
        if arrived is None or not any(done := arrived.tolist()):
            continue
        room = width - done.count(False)
        if not (queue or worth_shrinking(sum(done), len(done), device)):
            continue
        if watch is not None:
            watch.catch_up(state)
        whole.put(rows, state)
        kept = [i for i, d in enumerate(done) if not d]
        keep = torch.tensor(kept, dtype=torch.int64, device=device)
        fresh, queue = queue[:room], queue[room:]
        numbers = [numbers[i] for i in kept] + fresh
        rows = torch.cat((rows[keep], rows.new_tensor(fresh)))
        step.rearrange(keep, len(fresh))
        state = step.enter(state.rearranged(whole, rows, keep))
        flags.receive()  # of rows that have moved


def worth_shrinking(finished: int, total: int, device: torch.device) -> bool:
    """Whether to drop finished rows without a replacement: always on the CPU, else once a quarter is finished."""
    return finished == total or device.type == "cpu" or finished * 4 >= total
