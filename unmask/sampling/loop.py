"""The one generation loop. It yields a record of every step, from which results, streams and recordings are made."""

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

    def __call__(self, state: State) -> tuple[Observation, Tensor]:
        """One forward, one decision, one commit. A row that is held does not change."""
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
    """Advance all rows of ``whole`` to their end, at most ``width`` of them at once (None: all).

    The next row replaces a finished one; without a next row, the batch shrinks. Rows are written back to ``whole``
    when they leave the batch, the last ones when the loop ends.
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

    On CUDA the flags are copied to pinned memory behind the step that set them and read after the next step is queued,
    so the device never idles. A row takes at most one step too many, which ``ops.unmask_`` ignores.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def poll(self, state: State) -> list[bool] | None:
        """Flags (N) of this step, on CUDA of the step before; None while none have arrived."""
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
    """Whether to drop finished rows without a replacement: always on the CPU, else once a quarter is finished."""
    return finished == total or device.type == "cpu" or finished * 4 >= total
