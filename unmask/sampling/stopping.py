"""Stop strings: a row ends once its committed tokens up to the first mask contain one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.sampling.cache import to_device
from unmask.sampling.late import LateCopy
from unmask.sampling.state import COMPLETE, State


class StopStrings:
    """Finds the first of some texts in tokens. Special tokens count as text: a stop may be "<|im_end|>"."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], stop_ids: Sequence[int]) -> None:
        """``stop_ids`` end what is looked through: ends of sequence, and the mask token."""
        self.stops, self.stop_ids = stops, frozenset(stop_ids)
        self.spoken = partial(tokenizer.decode, skip_special_tokens=True)
        self.written = partial(tokenizer.decode, skip_special_tokens=False)

    def end(self, ids: Sequence[int]) -> int | None:
        """How many of ``ids`` it takes, from the left, to contain a stop; None: they contain none."""
        low, high = 0, next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        if not self.within(ids[:high]):
            return None
        while high - low > 1:  # ids[:high] contain one, ids[:low] do not
            middle = (low + high) // 2
            low, high = (low, middle) if self.within(ids[:middle]) else (middle, high)
        return high

    def within(self, ids: Sequence[int]) -> bool:
        texts = (self.spoken(ids), self.written(ids))
        return any(stop in text for text in texts for stop in self.stops)

    def cut(self, rows: Sequence[Sequence[int]]) -> dict[int, tuple[int, str]]:
        """For each of ``rows`` that contains a stop, by its number: :meth:`end`, and the text before the stop."""
        ends = {number: self.end(row) for number, row in enumerate(rows)}
        return {number: (end, self.text(rows[number][:end])) for number, end in ends.items() if end is not None}

    def text(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, as many as :meth:`end` says, before the stop."""
        text = self.spoken(ids)
        if places := [text.index(stop) for stop in self.stops if stop in text]:
            return str(text[: min(places)])
        begin = next(i for i in range(len(ids), -1, -1) if self.within(ids[i:]))  # it has special tokens
        rest = self.written(ids[begin:])
        return str(self.spoken(ids[:begin])) + rest[: min(rest.index(stop) for stop in self.stops if stop in rest)]


class StopWatch:
    """Ends rows that contain a stop, one step late on CUDA, so that nothing waits; the results are the same.

    What a row was when it first contained the stop is brought back, however much later that is noticed.
    """

    def __init__(self, strings: StopStrings, filler: int, late: bool) -> None:
        """``filler``: the id that is put behind the stop."""
        self.strings, self.filler, self.copy = strings, filler, LateCopy(late)
        self.sent: list[int] = []
        self.seen: dict[int, int | None] = {}
        """By the number of a row in the generation: tokens looked through, None once it has ended."""

    def look(self, numbers: list[int], state: State) -> None:
        """Look at rows ``numbers`` after a step of ``state``, and end those that have to."""
        index = torch.arange(state.length, device=state.rows.device)
        ids = torch.where(index < settled(state)[:, None], state.buffer, -1)
        arrived = self.copy.swap(torch.column_stack((state.steps, state.forwards, ids)))
        self._read(self.sent if self.copy.late else numbers, arrived, state)
        self.sent = numbers

    def catch_up(self, state: State) -> None:
        """End rows by what is still on its way; called before rows change."""
        self._read(self.sent, self.copy.receive(), state)

    def _read(self, numbers: list[int], arrived: Tensor | None, state: State) -> None:
        found = []
        for place, (number, row) in enumerate(zip(numbers, [] if arrived is None else arrived.tolist(), strict=False)):
            ids, seen = [token for token in row[2:] if token >= 0], self.seen.get(number, 0)
            if seen is None or len(ids) == seen:
                continue
            end = self.strings.end(ids)
            self.seen[number] = len(ids) if end is None else None
            if end is not None:
                found.append([place, end, *row[:2]])
        if found:
            columns = [number for column in zip(*found, strict=True) for number in column]
            places, ends, steps, forwards = to_device(columns, state.rows.device).view(4, -1)
            finish(state, places, ends, self.filler)
            state.steps.index_copy_(0, places, steps)
            state.forwards.index_copy_(0, places, forwards)


def settled(state: State) -> Tensor:
    """(N,) int64: tokens from the buffer's start that are committed and will not be revised."""
    index = torch.arange(state.length, device=state.rows.device)
    count = torch.where(state.mask, index, state.length).amin(dim=1)
    if state.max_post is not None:
        final = torch.zeros_like(count) if state.everywhere else state.block * state.block_length - state.phase
        count = torch.where(state.done, count, final.clamp_min(0).minimum(count))
    return count.clamp_max(state.horizon)


def finish(state: State, rows: Tensor, ends: Tensor, filler: int) -> None:
    """End ``rows`` (K,) of ``state`` as complete, with ``filler`` behind their first ``ends`` (K,) tokens."""
    index = torch.arange(state.length, device=rows.device)
    behind = torch.zeros_like(state.mask).index_put_((rows,), index >= ends[:, None])
    ended = torch.zeros_like(state.done).index_fill_(0, rows, True)
    state.buffer.masked_fill_(behind, filler)
    for flags in (state.mask, state.allowed):
        flags.masked_fill_(ended[:, None], False)
    state.remaining.masked_fill_(ended, 0)
    state.status.masked_fill_(ended, COMPLETE)
    state.block.copy_(torch.where(ended, state.num_blocks, state.block))
