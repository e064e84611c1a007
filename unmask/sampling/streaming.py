"""Streamers as in transformers: text from left to right, although positions are filled in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from unmask.sampling.loop import StepRecord
from unmask.sampling.result import first_stop
from unmask.sampling.state import State


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
    end of sequence. Tokens behind a mask wait until that mask is filled.
    """

    def __init__(self, streamer: Streamer, state: State, stop_ids: Sequence[int]) -> None:
        """Puts the prompt. Raises ValueError if ``state`` does not hold exactly one row."""
        if state.tokens.shape[0] != 1:
            raise ValueError(f"streamer takes one prompt at a time, got {state.tokens.shape[0]}")
        self.streamer, self.stop_ids, self.sent, self.length = streamer, stop_ids, 0, state.horizon
        self.drafts = hasattr(streamer, "put_draft") and not getattr(streamer, "_takes_logits", False)
        prompt = state.tokens[:, : state.start]
        if state.attention is not None:  # the row has padding
            prompt = prompt[:, state.attention[0, : state.start]]
        streamer.put(prompt.cpu())

    def follow(self, records: Iterable[StepRecord], whole: State) -> Iterator[StepRecord]:
        """Yield ``records`` while feeding the streamer; at the end it gets the rest, masks included."""
        for record in records:
            work = record.state
            buffer, mask = work.buffer[0].cpu(), work.mask[0].cpu()
            masked = mask.nonzero()
            settled = int(masked[0]) if len(masked) else len(buffer)
            if work.max_post is not None:  # what may still be revised is not sent
                settled = 0 if work.everywhere else int(work.block[0] * work.block_length - work.phase[0])
            self._send(buffer, max(0, min(settled, self.length)))
            rest = buffer[self.sent : self.length]
            rest = rest[rest >= 0]  # without canvases to come
            if self.drafts and len(masked) and len(rest) and not bool(work.done[0]):
                self.streamer.put_draft(rest[None].clone())  # type: ignore[attr-defined]
            yield record
        self._send(whole.buffer[0].cpu(), self.length)

    def _send(self, buffer: Tensor, stop: int) -> None:
        """Put the new tokens of ``buffer[:stop]`` up to the first end of sequence."""
        stop = min(stop, int(first_stop(buffer[None], self.stop_ids)) + 1)
        if stop > self.sent:
            self.streamer.put(buffer[self.sent : stop].clone())
            self.sent = stop
