"""Timings of what a GPU does: calls without the host's part in them, on inputs that its cache does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from unmask.sampling.capture import Backend, CudaGraphs
from unmask.sampling.capture import Captured as Graph

Call = Callable[[], Any]

CALLS = 20
"""In one graph: its own launch is spread over them."""
CACHED = 2**28
"""Bytes of which a GPU's cache (50 MB on an H100, 60 MB at most) holds only a small part."""
FROM_PYTHON = "unmask, from Python"


class Captured:
    """Calls as one graph, made when first called: what the device takes for them, with nothing of the host's."""

    def __init__(self, call: Call, backend: Backend, calls: int = CALLS) -> None:
        self.call, self.backend, self.calls = call, backend, calls
        self._graph: Graph | None = None

    def __call__(self) -> Any:
        """Replay all calls; returns what the last one did, which lies in the same memory every time."""
        if self._graph is None:
            self.backend.warm_up(self.call)
            self._graph = self.backend.capture(self._repeat)
        return self._graph.replay()

    def _repeat(self) -> Any:
        for _ in range(self.calls - 1):
            self.call()
        return self.call()


def calls_in(call: Call) -> int:
    """How often the work is done when ``call`` is called."""
    return call.calls if isinstance(call, Captured) else 1


def on_device(call: Call, device: torch.device, calls: int = CALLS) -> Call:
    """``call`` as a CUDA device runs it; on other devices, as it is."""
    return Captured(call, CudaGraphs(device), calls) if device.type == "cuda" else call


def library(call: Call, device: torch.device, calls: int = CALLS, captured: Call | None = None) -> dict[str, Call]:
    """The library's contender; on CUDA as the device runs it, and a second one of the same call made from Python.

    ``captured``: what to capture, where that cannot be ``call`` itself.
    """
    if device.type != "cuda":
        return {"unmask": call}
    return {"unmask": on_device(captured or call, device, calls), FROM_PYTHON: call}


def copies(tensor: Tensor, nbytes: int | None = None) -> list[Tensor]:
    """``tensor`` and on CUDA as many copies as no cache holds, when a call reads ``nbytes`` (None: all) of one."""
    count = -(-CACHED // (nbytes or tensor.nbytes)) if tensor.is_cuda else 1
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def in_turn(function: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Call:
    """A call of ``function`` on one of ``inputs`` after the other."""
    turns = cycle(inputs)
    return lambda: function(next(turns))
