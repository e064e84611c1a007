"""Baselines that have to be made first: compiled eager code, and a kernel of one block per row."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.benchmarking.timing import Unavailable, first_line

SOURCE = Path(__file__).with_name("one_block_per_row.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As numbered in the source."""

Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (..., V) to the largest probability (..., 1) and its token (...)."""


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """``function`` under ``torch.compile``, compiled for ``arguments`` by a first call.

    Raises Unavailable, with the compiler's own words, where it cannot be compiled.
    """
    try:
        torch._dynamo.reset()
        made = torch.compile(function, dynamic=False)
        made(*arguments)
    except Exception as error:  # whatever a missing or failing compiler raises
        raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
    return made


def one_block_per_row(device: torch.device) -> Statistics:
    """The kernel in ``one_block_per_row.cu``, compiled for ``device``.

    Raises Unavailable without a CUDA device or compiler.
    """
    if device.type != "cuda":
        raise Unavailable("a CUDA kernel")
    major, minor = torch.cuda.get_device_capability(device)
    library = load(f"{major}{minor}")

    def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits.reshape(-1, logits.shape[-1])
        if not rows.is_contiguous():
            raise ValueError(f"logits: expected contiguous rows, got strides {rows.stride()}")
        confidence = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        token = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
        status = library.one_block_per_row(
            rows.data_ptr(),
            DTYPES[rows.dtype],
            rows.shape[0],
            rows.shape[1],
            confidence.data_ptr(),
            token.data_ptr(),
            torch.cuda.current_stream(rows.device).cuda_stream,
        )
        if status != 0:
            raise RuntimeError(f"one_block_per_row: CUDA error {status}")
        return confidence.view(*logits.shape[:-1], 1), token.view(logits.shape[:-1])

    return statistics


@functools.lru_cache(maxsize=1)
def load(capability: str) -> ctypes.CDLL:
    """The compiled kernel; its folder is gone once it is loaded."""
    with tempfile.TemporaryDirectory(prefix="unmask-baseline-") as folder:
        library = ctypes.CDLL(str(build(capability, Path(folder) / "one_block_per_row.so")))
    pointer = ctypes.c_void_p
    library.one_block_per_row.argtypes = [
        pointer,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
        pointer,
        pointer,
        pointer,
    ]
    library.one_block_per_row.restype = ctypes.c_int
    return library


def build(capability: str, target: Path) -> Path:
    """Compile the kernel to a shared library for a compute capability such as "90"; raises Unavailable."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise Unavailable("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    command += [f"-gencode=arch=compute_{capability},code=sm_{capability}", "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"nvcc failed: {(done.stderr.strip() or 'no message').splitlines()[0][:100]}")
    return target


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")
