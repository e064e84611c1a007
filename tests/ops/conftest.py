"""Each op test runs on the kernels of every device there is, and in plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from on_reference import plain_torch

from unmask.ops import build_info

os.environ.setdefault("PTX_SMS", "16")
"""Of an emulated GPU, where the kernels run on the CPU: a cooperative grid has a stack for every thread at once."""
CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() and build_info()["cuda"] else []


@pytest.fixture(params=["cpu", *CUDA, "torch"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of a test go: on a device with kernels, or on the CPU while plain torch computes the ops."""
    if request.param != "torch":
        yield torch.device(request.param)
        return
    with plain_torch():
        yield torch.device("cpu")


@pytest.fixture(params=["cpu", *CUDA])
def kernels(request: pytest.FixtureRequest) -> torch.device:
    """A device with kernels."""
    return torch.device(request.param)
