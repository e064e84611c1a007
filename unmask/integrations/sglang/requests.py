"""What is remembered of a request: within its active block, and from block to block."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

EDITABLE = "editable"
"""The name in a state's memory of (BL,) bool: positions that were masked when the block began."""


@dataclass
class BlockState:
    """One request in its active block. The counters live on the host, where whoever asks "done?" waits anyway."""

    request: str
    """The engine's id of the request."""
    end: int
    """Length of the request's sequence up to the end of the block."""
    before: int = 0
    """Steps taken in the request's earlier blocks."""
    steps: int = 0
    """Steps taken in this block."""
    before_post: int = 0
    """Forwards of the request's earlier blocks that could only revise."""
    forwards: int = 0
    """All forwards of this block: its steps, and those that could only revise."""
    ended: bool = False
    """Whether the block's tokens are final."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """This row of every tensor in the policy's memory, and of ``EDITABLE`` where tokens may be revised."""

    @cached_property
    def key(self) -> int:
        """What the request's random draws are keyed by: 32 bits, the same in every process."""
        return int.from_bytes(hashlib.blake2b(self.request.encode(), digest_size=4).digest(), "little")


class Progress:
    """Steps and forwards taken by each request up to its latest block.

    Engines drop a block's state when the block is done and say nothing when a request ends. So what outlives a block
    is kept here by the request's id, and the requests not heard of for longest are forgotten.
    """

    def __init__(self, block_length: int, capacity: int = 65536) -> None:
        self.block_length, self.capacity = block_length, capacity
        self._latest: dict[str, BlockState] = {}  # the one that took a step last is the last

    def enter(self, request: str, end: int) -> BlockState:
        """The state of ``request`` as it enters the block that ends at ``end``; changes nothing.

        The next block continues the count, the same block again (a retracted request) repeats it from the block's
        start, and any other belongs to another request under an old id.
        """
        latest = self._latest.get(request)
        if latest is None or end - latest.end not in (0, self.block_length):
            return BlockState(request, end)
        steps, forwards = (latest.steps, latest.forwards) if end > latest.end else (0, 0)
        before_post = latest.before_post + forwards - steps
        return BlockState(request, end, before=latest.before + steps, before_post=before_post)

    def advance(self, state: BlockState, steps: int, forwards: int) -> None:
        """Note that the block of ``state`` took so many, and remember it."""
        state.steps, state.forwards = steps, forwards
        self._latest.pop(state.request, None)
        self._latest[state.request] = state
        if len(self._latest) > self.capacity:
            del self._latest[next(iter(self._latest))]


class BatchMemory:
    """A policy's memory, whose tensors have one row per request, as requests join and leave the batch."""

    def __init__(self) -> None:
        self._states: list[BlockState] = []
        self._memory: dict[str, Tensor] = {}

    def gather(self, states: Sequence[BlockState]) -> dict[str, Tensor]:
        """The memory for these requests, (B, ...) each; rows of requests new to it are 0."""
        if [id(state) for state in states] != [id(state) for state in self._states]:
            self._states = list(states)
            known = {name: row for state in states for name, row in state.memory.items()}
            self._memory = {
                name: torch.stack([s.memory[name] if name in s.memory else torch.zeros_like(row) for s in states])
                for name, row in known.items()
            }
        return self._memory

    def scatter(self) -> None:
        """Leave each request a view of its row, to take along."""
        rows = {name: value.unbind(0) for name, value in self._memory.items() if isinstance(value, Tensor)}
        for i, state in enumerate(self._states):
            state.memory = {name: values[i] for name, values in rows.items()}
