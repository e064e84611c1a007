"""Calls as they are timed: on inputs in turn, in a CUDA graph, behind a flushed cache, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from unmask.sampling.graphs import Capture, CudaCapture

Call = Callable[[], Any]

CALLS = 20
"""In one graph: its own launch is spread over them."""
CACHED = 2**28
"""Bytes of which a GPU's cache (50 MB on an H100) holds only a small part."""


class Unavailable(Exception):
    """A baseline cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work."""

    call: Call
    compared: Call | None = None
    """Gives what is compared, where that is not what ``call`` returns: its actions may be random."""
    part: bool = False
    """It does only a part of the work, for orientation. It is not compared and gets no ratio."""


class Captured:
    """Calls as one graph, captured when first called: what the device takes for them, without the host's part."""

    def __init__(self, call: Call, capture: Capture, calls: int = CALLS) -> None:
        self.call, self.capture, self.calls = call, capture, calls
        self.replay: Callable[[], None] | None = None
        self.output: Any = None

    def __call__(self) -> Any:
        """Replay all calls. Returns what the last one returned, which lies in the same memory every time."""
        if self.replay is None:
            self.call()  # libraries load and reserve what they need
            self.replay, self.output = self.capture(self._repeat)
        self.replay()
        return self.output

    def _repeat(self) -> Any:
        for _ in range(self.calls - 1):
            self.call()
        return self.call()


class Flushed:
    """A call before which the device's cache is flushed. The time that flushing takes is measured too, and taken off."""

    def __init__(self, call: Call, device: torch.device) -> None:
        flush = torch.zeros(CACHED // 4, device=device).amax  # a read: no write is under way when the call begins

        def behind_flush() -> Any:
            flush()
            return call()

        self.whole, self.flushes = on_device(behind_flush, device), on_device(flush, device)
        self.calls = calls_in(self.whole)

    def __call__(self) -> Any:
        return self.whole()


def calls_in(call: Call) -> int:
    """How often the work is done when ``call`` is called."""
    return getattr(call, "calls", 1)


def on_device(call: Call, device: torch.device) -> Call:
    """``call`` as a CUDA device runs it; on other devices, as it is."""
    return Captured(call, CudaCapture(device)) if device.type == "cuda" else call


def library(call: Call, device: torch.device, compared: Call | None = None) -> dict[str, Contender]:
    """The library's contender; on CUDA as the device runs it, and a second one of the same call made from Python."""
    if device.type != "cuda":
        return {"unmask": Contender(call, compared)}
    captured = None if compared is None else on_device(compared, device)
    return {
        "unmask": Contender(on_device(call, device), captured),
        "unmask, from Python": Contender(call, compared),
    }


def copies(tensor: Tensor) -> list[Tensor]:
    """``tensor`` and, on CUDA, as many copies as no cache holds."""
    count = -(-CACHED // tensor.nbytes) if tensor.is_cuda else 1
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def in_turn(function: Callable[[Tensor], Any], inputs: list[Tensor]) -> Call:
    """A call of ``function`` on one of ``inputs`` after the other."""
    turns = cycle(inputs)
    return lambda: function(next(turns))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under ``torch.compile``. The first call compiles it, and raises Unavailable where that fails."""
    torch._dynamo.reset()
    made = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        try:
            return made(*arguments)
        except Exception as error:  # whatever a missing or failing compiler raises
            raise Unavailable(f"torch.compile failed: {first_line(error)}") from error

    return call


def first_line(error: BaseException, length: int = 100) -> str:
    """What an error says, cut to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]
