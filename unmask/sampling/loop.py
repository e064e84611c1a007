"""The one generation loop. It yields a record of every step; whatever is made of a generation consumes these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmask.policies.base import Observation, UnmaskingPolicy
from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import Forward
from unmask.sampling.state import PAUSED, RUNNING, State
from unmask.sampling.step import commit, observation


@dataclass
class StepRecord:
    """One denoising step of the rows that are being worked on."""

    rows: Tensor
    """(R,) int64: which rows of the generation these are."""
    state: State
    """They as they are after the step. It changes in place with the next step."""
    observation: Observation
    """What the policy saw. With ``record`` it holds copies, else views of the state."""
    rank: Tensor
    """(R, L) int32: -1 where nothing was committed, else 0, or for "dpls" the order of the draw."""
    finished: int
    """Rows of the generation that had left the batch before this step."""

    @property
    def took(self) -> Tensor:
        """(R,) bool: rows that took the step. The others were finished, or held for a refresh of their cache."""
        return self.state.steps > self.observation.steps


class Runner(Protocol):
    """What advances a batch of rows: :class:`Step`, or captured copies of it."""

    def enter(self, state: State) -> State:
        """Begin with these rows, or go on with them after a change. Returns the state that steps advance."""
        ...

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Rows ``keep`` (K,) stay, in this order, then come ``fresh`` new ones; :meth:`enter` follows."""
        ...

    def __call__(self, state: State) -> tuple[Observation, Tensor]:
        """Advance the rows by one step; returns what the policy saw, and the ranks (N, L)."""
        ...


class Step:
    """A forward, a policy and a configuration, ready to advance any state by one step."""

    def __init__(self, forward: Forward, policy: UnmaskingPolicy, config: SamplerConfig) -> None:
        self.forward, self.policy, self.config = forward, policy, config

    def enter(self, state: State) -> State:
        return state

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        self.forward.rearrange(keep, fresh)

    def __call__(self, state: State) -> tuple[Observation, Tensor]:
        """One forward, one decision, one commitment. A row that takes no step is left as it is."""
        seen = observation(self.forward(state), state, self.policy, self.config)
        held = self.forward.held(state)
        if held is None:
            return seen, commit(state, seen, self.policy.decide(seen), self.config)
        before = {name: value.clone() for name, value in state.memory.items() if isinstance(value, Tensor)}
        decision = self.policy.decide(seen)
        for name, value in before.items():
            kept = held.view(-1, *(1,) * (value.ndim - 1))
            state.memory[name].copy_(torch.where(kept, value, state.memory[name]))
        state.status.masked_fill_(held, PAUSED)
        rank = commit(state, seen, decision, self.config)
        state.status.masked_fill_(held, RUNNING)
        return seen, rank


@torch.no_grad()
def decode(whole: State, step: Runner, width: int | None = None) -> Iterator[StepRecord]:
    """Advance all rows of ``whole`` to their end, with at most ``width`` of them side by side (None: all).

    A finished row makes room for the next one, or the batch shrinks. Rows are written back to ``whole`` as they
    leave the batch, the last ones when the loop ends.
    """
    device = whole.tokens.device
    queue = (whole.status == RUNNING).nonzero().flatten().tolist()
    total = whole.rows.shape[0]
    width = min(width or len(queue), len(queue))
    rows = torch.tensor(queue[:width], dtype=torch.int64, device=device)
    del queue[:width]
    state, flags = step.enter(whole.take(rows)), DoneFlags(device)
    while len(rows):
        seen, rank = step(state)
        yield StepRecord(rows, state, seen, rank, total - len(rows) - len(queue))
        done = flags.poll(state)
        if done is None or not any(done):
            continue
        room = width - done.count(False)
        if not (queue or worth_shrinking(sum(done), len(done), device)):
            continue
        whole.put(rows, state)
        keep = torch.tensor([i for i, d in enumerate(done) if not d], dtype=torch.int64, device=device)
        fresh, queue = queue[:room], queue[room:]
        rows = torch.cat((rows[keep], rows.new_tensor(fresh)))
        step.rearrange(keep, len(fresh))
        state = step.enter(state.rearranged(whole, rows, keep))
        flags.reset()


class DoneFlags:
    """Reads which rows are done: at once on the CPU, one step late on CUDA.

    On CUDA the flags are copied to pinned memory behind the step that set them and read when the next step is
    already queued, so the device never idles. A row takes at most one step too many, which ``ops.unmask_`` ignores.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def poll(self, state: State) -> list[bool] | None:
        """Flags (N) of the step before this one (CUDA) or of this one; None while none have arrived."""
        done = state.done
        if not self.on_cuda:
            return done.tolist()
        flags = torch.empty(done.shape, dtype=torch.bool, pin_memory=True)
        flags.copy_(done, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(done.device))
        self._pending.append((flags, event))
        if len(self._pending) < 2:
            return None
        flags, event = self._pending.pop(0)
        event.synchronize()
        return flags.tolist()

    def reset(self) -> None:
        """Forget flags in flight: the batch has changed."""
        self._pending.clear()


def worth_shrinking(finished: int, total: int, device: torch.device) -> bool:
    """Whether to drop finished rows that nothing can replace.

    On the CPU always, as each costs time; elsewhere once a quarter of the batch idles.
    """
    return finished == total or device.type == "cpu" or finished * 4 >= total
