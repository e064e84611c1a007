"""Fast-dLLM's block-wise caches: which positions each step recomputes, and what is kept of the others.

A row is refreshed (all its positions computed anew) when it starts or enters a block, and every ``cache_refresh``
steps within one. In between only a window is computed: with "prefix" from the active block to the end, with "dual" the
active block. Windows attend to the other positions' keys and values of the last refresh. A row's schedule depends on
that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.models.kv_cache import KVCache
from unmask.sampling.config import SamplerConfig
from unmask.sampling.late import LateCopy
from unmask.sampling.state import State, positions_from
from unmask.sampling.step import OF_BLOCK

Stamp = tuple[int, int]
"""A row's active block and steps taken."""


@dataclass
class Part:
    """Rows of the working batch that one forward computes."""

    rows: Tensor | None
    """(N,) int64; None: all."""
    computed: Tensor | None
    """(N, W) int64 canvas positions to compute, T for an empty place; None: all."""
    wanted: Tensor
    """(N, S) int64 buffer positions whose logits are wanted; past the end, the last position again."""
    row: int | None = None
    """The row's number, if every row has a forward of its own."""


class CachePlan:
    """The schedule of one generation, its keys and values, and the last statistics of every position.

    The host computes the schedule and must not wait for the device. On the CPU (``late`` False) it reads each row's
    current block. With ``late`` it reads the block one step late. If a row is due for a refresh and the host does not
    know it yet, that step is discarded for the row (see :meth:`held`), so the results are the same either way.
    """

    def __init__(self, model: Any, config: SamplerConfig, block_only: bool, late: bool) -> None:
        """``block_only``: the policy reads only the active block."""
        self.model, self.block_only = model, block_only
        self.dual, self.refresh_every, self.alone = config.cache == "dual", config.cache_refresh, config.deterministic
        self.cache: KVCache | None = None
        self.known: dict[str, Tensor] = {}
        """Per name (N, L, ...): the last statistics of each position; of the active block alone (N, BL, ...)."""
        self._stored: list[Stamp | None] = []  # each row at its last refresh that the host knows of
        self._stamp = torch.empty(0)  # (2, N) int64: the last refresh on the device
        self._refreshed: list[int] = []  # rows refreshed in the last step
        self.copy = LateCopy(late)  # (2, N): blocks and steps, on their way to the host

    def parts(self, state: State) -> list[Part]:
        """The parts to compute in this step: the rows to refresh, then the windows of the others."""
        count = state.rows.shape[0]
        if self.cache is None:
            self.cache = self.model.new_cache(count, state.tokens.shape[1])
            self._stored = [None] * count
            self._stamp = torch.full((2, count), -1, dtype=torch.int64, device=state.steps.device)
        now = self._learn(state)
        num_blocks = -(-state.length // state.block_length)
        live = [i for i in range(count) if now is None or now[i][0] < num_blocks]
        refresh = [i for i in live if self._due(i, None if now is None else now[i])]
        windows = sorted(set(live) - set(refresh)) if refresh or self.alone else list(range(count))
        parts = [self._whole(state, group) for group in self._groups(refresh)]
        for part in parts:
            index = slice(None) if part.rows is None else part.rows
            self._stamp[:, index] = torch.stack((state.block, state.steps))[:, index]
        self._refreshed = refresh
        if not self.copy.late:
            self._remember(now)
        return parts + [self._window(state, group) for group in self._groups(windows)]

    def held(self, state: State) -> Tensor | None:
        """(N,) bool: unfinished rows whose forward is discarded because a refresh is due; None: none can be."""
        if not self.copy.late:
            return None
        due = state.block != self._stamp[0]
        if self.refresh_every is not None:
            due |= state.steps - self._stamp[1] >= self.refresh_every
        return due & ~state.done

    def put(self, part: Part, values: dict[str, Tensor], length: int) -> None:
        """Keep ``values`` (N, S, ...) of the part's wanted positions, or of the active block."""
        count = len(self._stored)
        for name, new in values.items():
            shape = new.shape[1:] if name in OF_BLOCK else (length, *new.shape[2:])
            if name not in self.known:
                self.known[name] = new.new_zeros((count, *shape))
            rows = torch.arange(count, device=new.device) if part.rows is None else part.rows
            where = (rows,) if name in OF_BLOCK else (rows[:, None], part.wanted)
            self.known[name][where] = new

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Follow a change of the rows, see :meth:`unmask.sampling.loop.Runner.rearrange`. Waits for the device."""
        if self.cache is None:
            return
        self.cache.rearrange(keep, fresh)
        self._arrived(self.copy.receive())
        kept: list[Stamp | None] = [self._stored[i] for i in keep.tolist()]
        self._stored = kept + [None] * fresh
        self._stamp = torch.cat((self._stamp[:, keep], self._stamp.new_full((2, fresh), -1)), dim=1)
        for name, value in self.known.items():
            self.known[name] = torch.cat((value[keep], value.new_zeros((fresh, *value.shape[1:]))))

    def _due(self, row: int, now: Stamp | None) -> bool:
        stored = self._stored[row]
        if stored is None or now is None:
            return stored is None
        every = self.refresh_every
        return now[0] != stored[0] or (every is not None and now[1] - stored[1] >= every)

    def _learn(self, state: State) -> list[Stamp] | None:
        """Every row's block and steps, with ``late`` those of a step ago; None if nothing has arrived."""
        return self._arrived(self.copy.swap(torch.stack((state.block, state.steps))))

    def _arrived(self, stamps: Tensor | None) -> list[Stamp] | None:
        """Note the refreshes of the step that sent ``stamps`` (2, N)."""
        now = None if stamps is None else pairs(stamps)
        if self.copy.late and now is not None:
            self._remember(now)
        return now

    def _remember(self, now: list[Stamp] | None) -> None:
        assert now is not None
        for i in self._refreshed:
            self._stored[i] = now[i]
        self._refreshed = []

    def _groups(self, rows: list[int]) -> list[list[int]]:
        if self.alone:
            return [[i] for i in rows]
        return [rows] if rows else []

    def _part(self, state: State, group: list[int]) -> tuple[Tensor | None, int | None, Tensor]:
        """The group's rows as a tensor, its row if it has a forward of its own, and the active blocks (N,)."""
        everything = len(group) == state.rows.shape[0] and not self.alone
        rows = None if everything else to_device(group, state.block.device)
        return rows, group[0] if self.alone else None, state.block if rows is None else state.block[rows]

    def _whole(self, state: State, group: list[int]) -> Part:
        rows, row, block = self._part(state, group)
        if self.block_only:
            wanted = positions_from(block * state.block_length, state.block_length, state.length)
        else:
            wanted = torch.arange(state.length, device=block.device).expand(len(group), -1)
        return Part(rows=rows, computed=None, wanted=wanted, row=row)

    def _window(self, state: State, group: list[int]) -> Part:
        """The windows of a group have one width, the largest that a row may need."""
        rows, row, block = self._part(state, group)
        width = state.block_length
        if not self.dual:  # no row is in an earlier block than the host knows
            first = min(stamp[0] for stamp in (self._stored[i] for i in group) if stamp is not None)
            width = max(width, state.length - first * state.block_length)
        back, size = self.model.lookback, state.tokens.shape[1]
        offsets = torch.arange(-back, width, device=block.device)
        computed = block[:, None] * state.block_length + offsets + state.start
        computed = torch.where((computed >= 0) & (computed < size), computed, size)
        shown = state.block_length if self.block_only else width
        wanted = positions_from(block * state.block_length, shown, state.length)
        return Part(rows=rows, computed=computed, wanted=wanted, row=row)


def pairs(stamps: Tensor) -> list[Stamp]:
    """(2, N) as N pairs."""
    first, second = stamps.tolist()
    return list(zip(first, second, strict=True))


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """(N,) int64 on ``device``, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
