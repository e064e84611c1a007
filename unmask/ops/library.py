"""Loads the compiled extension, which registers ``torch.ops.unmask.*``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch  # must be loaded before the extension: it provides the libraries that the extension links to
from torch import Tensor


def _load() -> ModuleType:
    try:
        from unmask import _C
    except ImportError as error:
        raise ImportError(
            f"The compiled part of unmask (unmask._C) could not be loaded: {error}. It needs torch >= 2.11 (this is "
            f"torch {torch.__version__}). Install unmask with `pip install .`, or in a source tree build it in place "
            "with `python setup.py build_ext --inplace`."
        ) from error
    return _C


_C: Any = _load()


def build_info() -> dict[str, Any]:
    """What the extension was built with and runs on.

    Keys: ``cuda`` (bool: has CUDA kernels), ``cuda_archs`` (list of str, e.g. ["80", "90"]), ``compiler``,
    ``built_with_torch``, ``cpu_isa`` (instruction set in use: "avx512", "avx2" or "portable"; the environment variable
    UNMASK_CPU_ISA forces one) and ``cpu_isas`` (those this processor supports).
    """
    return dict(_C.build_info())


def graph_loop_unsupported() -> str:
    """Why a captured CUDA graph cannot be repeated by the device itself here; empty if it can (CUDA 12.4)."""
    return str(_C.graph_loop_unsupported())


def new_graph_loop(graph: int, done: Tensor, limit: Tensor) -> Any:
    """A loop that the device runs by itself; its ``launch(stream)`` queues it.

    The graph runs at least once, and again as long as more than ``limit`` of the flags ``done`` are False. Whoever
    holds the loop must keep both tensors, the graph and all memory it uses.

    Args:
        graph: address of a ``cudaGraph_t`` (``torch.cuda.CUDAGraph.raw_cuda_graph()``), which is copied.
        done: (N,) bool, contiguous, on a CUDA device.
        limit: (1,) int64 on that device, read after every run.

    Raises:
        RuntimeError: the driver or the build cannot do it, or the graph holds what a loop cannot (such as calls of the
            host or allocations).
        TypeError, ValueError: tensors of another kind.
    """
    if done.dtype != torch.bool or limit.dtype != torch.int64:
        raise TypeError(f"expected done as bool and limit as int64, got {done.dtype} and {limit.dtype}")
    if not (done.is_cuda and limit.device == done.device and done.is_contiguous() and limit.numel() == 1):
        raise ValueError(
            f"expected contiguous flags and one limit on one CUDA device, got {tuple(done.shape)} on {done.device} and "
            f"{tuple(limit.shape)} on {limit.device}"
        )
    if reason := graph_loop_unsupported():
        raise RuntimeError(f"no loop on the device: {reason}")
    return _C.GraphLoop(graph, done.data_ptr(), done.numel(), limit.data_ptr(), done.device.index)
