"""The wrappers of ``unmask.ops`` on plain torch instead of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from unmask.ops import build_info, library, reference

T = TypeVar("T")

needs_kernels = pytest.mark.skipif(build_info()["cpu_isa"] == "torch", reason="unmask has no compiled part here")


@contextmanager
def plain_torch(**options: Any) -> Iterator[None]:
    """Within it the ops of ``unmask.ops`` are computed by ``unmask.ops.reference``."""

    def call(name: str, *args: Any) -> Any:
        return getattr(reference, name)(*args, **options)

    with mock.patch.object(library, "call", call):
        yield


def on_kernels() -> bool:
    """Whether kernels compute the ops."""
    return library.call.__module__ == library.__name__


def truth(op: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What ``op`` must compute, in float64."""
    with plain_torch(dtype=torch.float64), torch.no_grad():
        return op(*args, **kwargs)
