"""Streamers as in transformers: text from left to right, although positions are filled in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from unmask.sampling.loop import StepRecord
from unmask.sampling.result import first_stop
from unmask.sampling.state import State
from unmask.sampling.stopping import StopStrings, settled


class Streamer(Protocol):
    """The interface of transformers' ``BaseStreamer``, such as ``TextStreamer`` and ``TextIteratorStreamer``.

    One that also has ``put_draft`` (as ``TextDiffusionStreamer``) gets the unfinished rest after every step.
    """

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, P), then tokens (n,), int64 on the CPU."""

    def end(self) -> None:
        """The generation is over."""


class PrefixStream:
    """Feeds a streamer the left-most finished part of one row's buffer as it grows.

    The streamer gets the prompt, then every token of the completion once and in order, up to and including the first
    end of sequence or stop string. Tokens behind a mask wait until that mask is filled.
    """

    def __init__(self, streamer: Streamer, state: State, stops: StopStrings | None = None) -> None:
        """Puts the prompt. Raises ValueError if ``state`` does not hold exactly one row."""
        if state.tokens.shape[0] != 1:
            raise ValueError(f"streamer takes one prompt at a time, got {state.tokens.shape[0]}")
        self.streamer, self.sent, self.length = streamer, 0, state.horizon
        self.stop_ids, self.stops = state.end_ids, stops
        self.drafts = hasattr(streamer, "put_draft") and not getattr(streamer, "_takes_logits", False)
        prompt = state.tokens[:, : state.start]
        if state.attention is not None:  # the row has padding
            prompt = prompt[:, state.attention[0, : state.start]]
        streamer.put(prompt.cpu())

    def follow(self, records: Iterable[StepRecord], whole: State) -> Iterator[StepRecord]:
        """Yield ``records`` while feeding the streamer; at the end it gets the rest, masks included."""
        for record in records:
            work = record.state
            buffer = work.buffer[0].cpu()
            self._send(buffer, int(settled(work)[0]))
            rest = buffer[self.sent : self.length]
            rest = rest[rest >= 0]  # without canvases to come
            if self.drafts and bool(work.mask.any()) and len(rest) and not bool(work.done[0]):
                self.streamer.put_draft(rest[None].clone())  # type: ignore[attr-defined]
            yield record
        self._send(whole.buffer[0].cpu(), self.length)

    def _send(self, buffer: Tensor, stop: int) -> None:
        """Put the new tokens of ``buffer[:stop]`` up to the first end of sequence or stop string."""
        stop = min(stop, int(first_stop(buffer[None], self.stop_ids)) + 1)
        if self.stops is not None:
            stop = self.stops.end(buffer[:stop].tolist()) or stop
        if stop > self.sent:
            self.streamer.put(buffer[self.sent : stop].clone())
            self.sent = stop
