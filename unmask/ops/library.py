"""Loads the compiled extension, which registers ``torch.ops.unmask.*``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch  # must be loaded before the extension: it provides the libraries that the extension links to


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
