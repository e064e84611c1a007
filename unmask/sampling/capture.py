"""CUDA graphs of a denoising step: how one is captured, replayed, and repeated by the device itself."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.ops.library import graph_loop_unsupported, new_graph_loop
from unmask.policies.base import Observation

StepOutput = tuple[Observation, Tensor]
"""What a policy saw, and the ranks (N, L) of what it unmasked."""
RunStep = Callable[[], StepOutput]
"""One step on tensors that stay where they are."""


class Captured(Protocol):
    """A step that is one launch. What it returns lies in the same memory every time."""

    nbytes: int
    """Memory that was reserved for it."""

    def replay(self) -> StepOutput: ...

    def loop(self, done: Tensor, limit: Tensor) -> bool:
        """Queue the step again and again, as long as more than ``limit`` (1,) int64 of ``done`` (N,) are False.

        At least once. False, and nothing is queued, where the device cannot do that by itself.
        """
        ...


class Backend(Protocol):
    """How steps are captured on one device."""

    device: torch.device

    def warm_up(self, run: RunStep) -> StepOutput:
        """Run a step so that everything it loads and reserves is there before a capture."""
        ...

    def rehearse(self, run: RunStep) -> tuple[StepOutput, str]:
        """Run a step; also what it does that a capture would not survive, such as waiting for the device, or ""."""
        ...

    def capture(self, run: RunStep) -> Captured:
        """The step as a graph; its work is recorded, not done. RuntimeError if it cannot be."""
        ...


class CudaGraphs:
    """The backend of a CUDA device. All graphs share one pool of memory, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._live: weakref.WeakSet[CudaStep] = weakref.WeakSet()  # whose graphs hold the pool
        self._failed: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of the captures, behind all that is queued and before all that will be."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def warm_up(self, run: RunStep) -> StepOutput:
        # Libraries keep a workspace per stream: made here, it does not come out of the graphs' pool.
        with self.aside():
            return run()

    def rehearse(self, run: RunStep) -> tuple[StepOutput, str]:
        mode = torch.cuda.get_sync_debug_mode()
        with synchronisations() as seen, self.aside():
            torch.cuda.set_sync_debug_mode("warn")  # of all threads: an error could hit another one
            try:
                output = run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        return output, "it waits for the device" if seen else ""

    def capture(self, run: RunStep) -> CudaStep:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        live = list(self._live)  # none of them may go before the capture has begun
        if not live:
            self.pool = torch.cuda.graph_pool_handle()  # a pool that all graphs have left takes no new one
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            with torch.cuda.stream(self.stream):
                torch.cuda.current_blas_handle()  # each thread has its own, and another one may have warmed up
            try:
                # Other threads may allocate meanwhile; only this one must not.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    reserved = torch.cuda.memory_reserved()
                    output = run()
                    nbytes = torch.cuda.memory_reserved() - reserved
            except BaseException:
                self._recover(graph)
                torch.cuda.set_stream(current)
                raise
        step = CudaStep(graph, output, nbytes)
        self._live.add(step)
        return step

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what torch leaves behind when CUDA has broken a capture off."""
        device = self.stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, self.pool)
        except RuntimeError:
            return  # it is not recording: the capture never began, or ended in good order behind a Python exception
        torch._C._cuda_releasePool(device, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        self._live.clear()
        self._failed.append(graph)  # the allocator of pinned memory goes on asking it which allocations are its own
        # In torch 2.11 the generator believes that it is still captured, and refuses to draw, until a capture ends.
        with suppress(RuntimeError):
            scratch = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
                scratch.add_(0)


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Torch's warnings that this thread has waited for the device; other warnings pass."""
    seen: list[str] = []
    thread = threading.get_ident()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *arguments: Any, **options: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                show(message, *arguments, **options)
            elif threading.get_ident() == thread:
                seen.append(str(message))

        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.showwarning = note
        yield seen


class CudaStep:
    """A captured step. Its loop is made when first asked for."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: StepOutput, nbytes: int) -> None:
        self.graph, self.output, self.nbytes = graph, output, nbytes
        self._loop: DeviceLoop | None = None
        self._loop_refused = bool(graph_loop_unsupported())

    def replay(self) -> StepOutput:
        self.graph.replay()
        return self.output

    def loop(self, done: Tensor, limit: Tensor) -> bool:
        if self._loop is None and not self._loop_refused:
            try:
                self._loop = DeviceLoop(self.graph, done, limit)
            except RuntimeError as error:
                self._loop_refused = True
                warnings.warn(f"the decoding loop stays on the host: {error}", RuntimeWarning, stacklevel=2)
        if self._loop is None:
            return False
        self._loop.launch()
        return True


class DeviceLoop:
    """A captured step that the device repeats until enough rows are done: one launch for a whole generation.

    A graph with a conditional WHILE node (CUDA 12.4): its body is a copy of the step and a kernel that counts the
    rows still running. See csrc/ops/graph_loop.h.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, done: Tensor, limit: Tensor) -> None:
        """``graph`` was captured with ``keep_graph``; ``done`` (N,) bool and ``limit`` (1,) int64 are read in the loop.

        Raises RuntimeError where the driver, the build or the graph does not allow it.
        """
        self._keep = (graph, done, limit)
        self._device = done.device
        self._loop = new_graph_loop(graph.raw_cuda_graph(), done, limit)

    def launch(self) -> None:
        """Queue the loop on the current stream."""
        self._loop.launch(torch.cuda.current_stream(self._device).cuda_stream)
