"""Streamers in the manner of transformers: text from left to right, though positions fill in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from unmask.sampling.loop import StepRecord
from unmask.sampling.result import first_stop
from unmask.sampling.state import State


class Streamer(Protocol):
    """What transformers' ``BaseStreamer`` asks for; its ``TextStreamer`` and ``TextIteratorStreamer`` are such.

    One that also has ``put_draft`` (as ``TextDiffusionStreamer``) is shown the unfinished rest after every step.
    """

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, P), later tokens (n,), all int64 on the CPU."""

    def end(self) -> None:
        """The generation is over."""


class PrefixStream:
    """Feeds a streamer the left-most finished part of one row's buffer as it grows.

    The streamer gets the prompt, then every token of the completion once and in order, up to and including the first
    end of sequence: what was committed ahead of a mask waits until that mask is filled.
    """

    def __init__(self, streamer: Streamer, state: State, stop_ids: Sequence[int]) -> None:
        """Puts the prompt; ``state`` must hold one row, else ValueError."""
        if state.tokens.shape[0] != 1:
            raise ValueError(f"streamer takes one prompt at a time, got {state.tokens.shape[0]}")
        self.streamer, self.stop_ids, self.sent = streamer, stop_ids, 0
        self.drafts = hasattr(streamer, "put_draft") and not getattr(streamer, "_takes_logits", False)
        prompt = state.tokens[:, : state.start]
        if state.attention is not None:  # one row that came padded
            prompt = prompt[:, state.attention[0, : state.start]]
        streamer.put(prompt.cpu())

    def follow(self, records: Iterable[StepRecord], whole: State) -> Iterator[StepRecord]:
        """The same records, each shown as it passes. At the end comes the rest, masks of an unfinished row included."""
        for record in records:
            work = record.state
            buffer, mask = work.buffer[0].cpu(), work.mask[0].cpu()
            masked = mask.nonzero()
            self._send(buffer, int(masked[0]) if len(masked) else len(buffer))
            if self.drafts and len(masked) and not bool(work.done[0]):
                self.streamer.put_draft(buffer[None, self.sent :].clone())  # type: ignore[attr-defined]
            yield record
        self._send(whole.buffer[0].cpu(), whole.length)

    def _send(self, buffer: Tensor, stop: int) -> None:
        """Put what is new of ``buffer[:stop]``, nothing behind the first end of sequence."""
        stop = min(stop, int(first_stop(buffer[None], self.stop_ids)) + 1)
        if stop > self.sent:
            self.streamer.put(buffer[self.sent : stop].clone())
            self.sent = stop
