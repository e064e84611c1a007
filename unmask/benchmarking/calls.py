"""Calls as they are timed: on inputs in turn, in a CUDA graph, behind a flushed cache, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from unmask.sampling.graphs import Capture, CudaCapture

Call = Callable[[], Any]

CALLS = 20  # in one graph: its own launch is spread over them
CACHED = 2**28  # bytes of which a GPU's cache (50 MB on an H100) holds only a small part


class Captured:
    """Calls as one graph, captured when first called: what the device takes for them, without the host's part.

    ``calls`` is how often the work is done in one call. Calls without this attribute do it once.
    """

    def __init__(self, call: Call, capture: Capture, calls: int = CALLS) -> None:
        self.call, self.capture, self.calls = call, capture, calls
        self.replay: Callable[[], None] | None = None
        self.output: Any = None

    def __call__(self) -> Any:
        """Replay all calls. Returns what the last one returned, which lies in the same memory every time."""
        if self.replay is None:
            self.call()  # libraries load and reserve what they need
            self.replay, self.output = self.capture(lambda: [self.call() for _ in range(self.calls)][-1])
        self.replay()
        return self.output


class Flushed:
    """A call behind a flush of the device's cache. The time of the flush is measured too, and taken off."""

    def __init__(self, call: Call, device: torch.device) -> None:
        flush = torch.zeros(CACHED // 4, device=device).amax  # a read: no write is under way when the call begins
        self.whole, self.flushes = on_device(lambda: (flush(), call())[1], device), on_device(flush, device)
        self.calls = getattr(self.whole, "calls", 1)

    def __call__(self) -> Any:
        return self.whole()


def on_device(call: Call, device: torch.device) -> Call:
    """``call`` as a CUDA device runs it; on other devices, as it is."""
    return Captured(call, CudaCapture(device)) if device.type == "cuda" else call


def library(call: Call, device: torch.device) -> dict[str, Call]:
    """The library's contender; on CUDA as the device runs it, and a second one of the same call made from Python."""
    return {"unmask": on_device(call, device)} | ({"unmask, from Python": call} if device.type == "cuda" else {})


def copies(tensor: Tensor) -> Iterator[Tensor]:
    """``tensor`` and, on CUDA, as many copies as no cache holds, in turn and without end."""
    count = -(-CACHED // tensor.nbytes) if tensor.is_cuda else 1
    return cycle([tensor, *(tensor.clone() for _ in range(count - 1))])


def compiled(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """``function`` under ``torch.compile``. The first call compiles it, and raises RuntimeError where that fails."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=dynamic)
