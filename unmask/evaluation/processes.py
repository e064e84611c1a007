"""The processes of ``torchrun`` or ``accelerate launch``, among which evaluations are split."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


def join() -> tuple[int, int]:
    """The number of this process and how many there are: (0, 1) without a launcher. Each gets a GPU of its own."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(weeks=4))  # one may be done long before the others
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return (distributed.get_rank(), count) if count > 1 else (0, 1)


def gather(value: Value) -> list[Value]:
    """The values of all processes, in order; all have to call it."""
    _, count = join()
    values: list[Value] = [value] * count
    if count > 1:
        distributed.all_gather_object(values, value)
    return values


def leave() -> None:
    """Wait for all processes and end their group, which may abort others if it is torn down at exit."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
