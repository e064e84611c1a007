"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

collect_ignore = ["ptx"]  # run by a tool that emulates a GPU, whose tests have the same names as those of the ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is: the CPU, and a CUDA device where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Ctrl-C works as in a terminal, for the programs of tests as well, where a shell started pytest behind "&"."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _buffered() -> None:
    """Programs of tests buffer what they print, as they do for users."""
    os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state, alone or in the whole suite, and leaves torch's settings alone."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
