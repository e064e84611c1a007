"""Exact keys and values of finished blocks, for models whose tokens never see a later block.

Each row has its own grid of attention blocks. A step computes the active block over the keys and values of all before
it. A block's keys are final only if its final tokens were computed, which the first forward of the next block does
beside its own: no forward is spent on storing. Models that are ``seeded`` get the first token of a block from the raw
row before it; there the forward that stores the block before is one of its own, and commits that one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.models.kv_cache import KVCache, KVWindow
from unmask.sampling.config import SamplerConfig
from unmask.sampling.late import LateCopy
from unmask.sampling.state import State

CHUNK = 1024
"""Prompt positions, in whole blocks, that one forward of the prefill computes."""
ROUNDING = 128
"""On CUDA a window sees a multiple of this many positions, so that few shapes occur."""


@dataclass
class Window:
    """The positions that one forward computes for N rows; positions count from the canvas's first."""

    begin: Tensor
    """(N,) int64: the first position of the active block; T for a finished row."""
    low: Tensor
    """(N,) int64: the first position to compute."""
    high: Tensor
    """(N,) int64: the end of the positions to compute."""
    base: Tensor
    """(N,) int64: the position at the window's first place."""
    width: int
    limit: int
    """No row computes a position from here on."""

    def computed(self, length: int) -> Tensor:
        """(N, W) int64: the positions, ``length`` at empty places."""
        at = self.base[:, None] + torch.arange(self.width, device=self.base.device)
        return torch.where((at >= self.low[:, None]) & (at < self.high[:, None]), at, length)


class BlockPlan:
    """Which positions the forwards of one generation compute, and the keys and values of the others.

    On CUDA the host does not know where rows are: windows have room for the block before, and it learns their end a
    step late. On the CPU it looks, and computes exactly what is needed.
    """

    def __init__(self, model: Any, config: SamplerConfig, late: bool) -> None:
        """``late``: the host must not wait for the device, except when rows enter."""
        self.model, self.alone, self.exact = model, config.deterministic, config.cache != "none"
        self.late = late
        self.cache: KVCache | None = None
        self.first = self.origin = self.stored = self.at = torch.empty(0, dtype=torch.int64)
        """(N,) int64 positions: first real token, start of the grid, end of final keys, block of the last forward."""
        self.seen = torch.empty(0, 0, dtype=torch.int64)
        """(N, G) int64: the tokens of that block as the last forward saw them."""
        self.seeding: Tensor | None = None
        """(N,) bool: rows to which this step gives only the seed of a block; None for models without."""
        self._fresh, self._bound, self._end = 0, 0, LateCopy(late=False)

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Follow a change of the rows, see :meth:`unmask.sampling.loop.Runner.rearrange`."""
        self._fresh = fresh
        if self.cache is not None:
            self.cache.rearrange(keep, fresh)
            for name in ("first", "origin", "stored", "at", "seen"):
                value = getattr(self, name)[keep]
                setattr(self, name, torch.cat((value, value.new_full((fresh, *value.shape[1:]), -1))))

    def logits(self, state: State) -> tuple[Tensor, Tensor]:
        """Logits (N, S, V) of buffer positions (N, S) of the active blocks.

        Where a row gets its seed, ``state.allowed`` is narrowed to that position.
        """
        begin = self._enter(state)
        window = self._window(state, begin)
        positions = state.positions()
        raw = torch.maximum(positions + state.start - self.model.lookback, begin[:, None])
        if self.seeding is not None:
            seed, rows = begin - state.start, self.seeding[:, None]
            positions = torch.where(rows, seed[:, None].clamp(0, state.length - 1), positions)
            raw = torch.where(rows, begin[:, None] - 1, raw)
            index = torch.arange(state.length, device=begin.device)
            state.allowed &= ~rows | (index == seed[:, None])
        logits = self._forward(state, window, raw.clamp(0, state.tokens.shape[1] - 1))
        assert logits is not None
        self.stored = torch.where(state.done, self.stored, begin)
        self.at, self.seen = begin, block_tokens(state, begin)
        return logits, positions

    def _enter(self, state: State) -> Tensor:
        """Take note of new rows and of blocks with final keys; returns where the active blocks begin (N,)."""
        if self.cache is None:
            count, device = state.rows.shape[0], state.rows.device
            # In an infill the active block may jump, for which a late host has no room.
            self._fresh, self._end = count, LateCopy(self.late and state.start > 0)
            self.first = self.origin = self.stored = self.at = torch.full((count,), -1, device=device)
            self.seen = torch.full((count, state.grid), -1, device=device)
            self.cache = self.model.new_cache(count, 1)
        new = self.first < 0
        pads = 0 if state.attention is None else (~state.attention).sum(1)
        self.first = torch.where(new, pads, self.first)
        grid = self.first if self.model.attention == "block-causal" else torch.full_like(self.first, state.start)
        self.origin = torch.where(new, grid, self.origin)
        self.stored = torch.where(new, self.first, self.stored)
        begin = active_block(state, self.origin)
        if self.exact and not self.model.seeded:
            final = (begin > self.at) & (self.seen == block_tokens(state, self.at.clamp_min(0))).all(1)
            self.stored = torch.where(final & (self.at >= 0), (self.at + state.grid).minimum(begin), self.stored)
        if self.exact:
            self._prefill(state, begin)
        elif self.model.seeded:
            self.stored = torch.where(begin < state.start, begin, self.stored)
        return begin

    def _prefill(self, state: State, begin: Tensor) -> None:
        """Store what lies more than a block before the active one: prompts, and blocks without masks (on the CPU)."""
        fresh, self._fresh, self.seeding = self._fresh, 0, None
        if not fresh and self._end.late:
            return
        grid, low, high, near = state.grid, self.stored, begin, state.grid
        if self.model.seeded:  # the last block before gives the seed, unless the prompt opens the active one
            high, near = torch.where(begin < state.start, begin, (begin - grid).maximum(self.first)), 0
        high = torch.where((low + near >= high) | state.done, low, high)
        total = int((high - low).amax())
        chunk = total if self.model.attention == "bidirectional-prefix" else -(-CHUNK // grid) * grid
        for offset in range(0, total, max(chunk, 1)):
            start = low + offset
            end = (start + chunk).minimum(high)
            window = Window(begin, start, end, start, min(chunk, total - offset), int(end.amax()))
            self._forward(state, window, None)
        self.stored = torch.maximum(low, high)
        if fresh:
            self._end.receive()  # of other rows
            self._bound = int(torch.where(state.done, 0, begin).amax())

    def _window(self, state: State, begin: Tensor) -> Window:
        """What this step computes: the active block, and what must be stored before it."""
        grid, length = state.grid, state.tokens.shape[1]
        end = (begin + grid).clamp_max(length)
        behind = (self.stored < begin) & ~state.done
        self.seeding = behind if self.model.seeded else None
        high = torch.where(behind, begin, end) if self.model.seeded else end
        low = torch.where(behind, self.stored, begin)
        limit = self._limit(torch.where(state.done, 0, high).amax(), grid, length)
        if not self.exact:
            return Window(begin, self.first, torch.where(state.done, 0, high), torch.zeros_like(low), limit, limit)
        if self.model.seeded:
            return Window(begin, low, high, low, grid, limit)
        merged = self._end.late or bool(behind.any())
        base = begin - grid if merged else begin
        return Window(begin, low, high, base, 2 * grid if merged else grid, limit)

    def _limit(self, end: Tensor, grid: int, length: int) -> int:
        """A bound of ``end`` (), the end of the furthest window."""
        arrived = self._end.swap(end)
        if not self._end.late:
            return int(end)
        self._bound = self._bound + grid if arrived is None else int(arrived) + grid  # one block per step at most
        return min(-(-self._bound // ROUNDING) * ROUNDING, length)

    def _horizon(self, state: State, window: Window, computed: Tensor) -> Tensor:
        """(N, W) int64: the last position that each computed one sees."""
        begin, kind = window.begin[:, None], self.model.attention
        if kind == "causal-prefix":
            causal = computed < begin if self.seeding is None else (computed < begin) | self.seeding[:, None]
            return torch.where(causal, computed, begin + state.grid - 1)
        origin = self.origin[:, None]
        last = origin + ((computed - origin).div(state.grid, rounding_mode="floor") + 1) * state.grid - 1
        if kind == "bidirectional-prefix":
            last = torch.where(computed < state.start, state.start - 1, last)
        return last

    def _forward(self, state: State, window: Window, raw: Tensor | None) -> Tensor | None:
        """Raw logits (N, S, V) of positions ``raw`` (N, S), by one forward, or one per row without its padding."""
        assert self.cache is not None
        self.cache.reserve(window.limit)
        length = state.tokens.shape[1]
        computed = window.computed(length)
        horizon = self._horizon(state, window, computed)
        run: Callable[..., Tensor | None] = self.model.forward_window
        if not self.alone:
            return run(state.tokens, state.attention, KVWindow(self.cache, computed, None, window.limit), raw, horizon)
        logits: list[tuple[int, Tensor | None]] = []
        for row, pad in enumerate(self.first.tolist()):
            own = (computed[row] < length).nonzero().flatten()  # the rest of the window belongs to other rows
            if not len(own):
                continue
            one = slice(row, row + 1)
            view = KVWindow(self.cache.alone(row, pad), computed[one, own] - pad, None, int(window.high[row]) - pad)
            wanted = None if raw is None else (raw[one] - pad).clamp_min(0)
            logits.append((row, run(state.tokens[one, pad:], None, view, wanted, horizon[one, own] - pad)))
        if raw is None:
            return None
        shape = (*raw.shape, self.model.vocab_size)
        out = torch.zeros(shape, dtype=self.model.dtype, device=raw.device)
        for row, values in logits:
            assert values is not None
            out[row] = values[0]
        return out


def active_block(state: State, origin: Tensor) -> Tensor:
    """(N,) int64: the canvas position at which each row's active attention block begins; T for a finished row."""
    at = state.start + state.block * state.block_length - state.phase
    begin = origin + (at - origin).div(state.grid, rounding_mode="floor") * state.grid
    return torch.where(state.done, state.tokens.shape[1], begin)


def block_tokens(state: State, begin: Tensor) -> Tensor:
    """(N, G) int64: the tokens of the blocks that begin at ``begin`` (N,); the last token repeats past the end."""
    at = begin[:, None] + torch.arange(state.grid, device=begin.device)
    return state.tokens.gather(1, at.clamp_max(state.tokens.shape[1] - 1))
