"""Streamers in the manner of transformers: text from left to right, though positions fill in any order."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from unmask.sampling.canvas import Canvas
from unmask.sampling.result import first_eos


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

    def __init__(self, streamer: Streamer, canvas: Canvas, eos_token_id: int | None) -> None:
        """Puts the prompt; ``canvas`` must hold one row, else ValueError."""
        if canvas.tokens.shape[0] != 1:
            raise ValueError(f"streamer takes one prompt at a time, got {canvas.tokens.shape[0]}")
        self.streamer, self.eos, self.sent = streamer, eos_token_id, 0
        self.drafts = hasattr(streamer, "put_draft") and not getattr(streamer, "_takes_logits", False)
        prompt = canvas.tokens[:, : canvas.start]
        if canvas.attention is not None:  # one row that came padded
            prompt = prompt[:, canvas.attention[0, : canvas.start]]
        streamer.put(prompt.cpu())

    def on_step(self, rows: Tensor, work: Canvas, *_: Any) -> None:
        """Follow one step; the working batch is the one row."""
        buffer, mask = work.buffer[0].cpu(), work.mask[0].cpu()
        masked = mask.nonzero()
        self._send(buffer, int(masked[0]) if len(masked) else len(buffer))
        if self.drafts and len(masked) and not bool(work.done[0]):
            self.streamer.put_draft(buffer[None, self.sent :].clone())  # type: ignore[attr-defined]

    def finish(self, canvas: Canvas) -> None:
        """Send the rest, which may hold masks where ``max_steps`` came first."""
        self._send(canvas.buffer[0].cpu(), canvas.length)

    def _send(self, buffer: Tensor, stop: int) -> None:
        """Put what is new of ``buffer[:stop]``, nothing behind the first end of sequence."""
        stop = min(stop, int(first_eos(buffer[None], self.eos)) + 1)
        if stop > self.sent:
            self.streamer.put(buffer[self.sent : stop].clone())
            self.sent = stop
