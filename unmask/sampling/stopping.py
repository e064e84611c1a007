"""Which rows are done, without making the device wait for the host, and what follows for the batch."""

from __future__ import annotations

import torch
from torch import Tensor


class DoneFlags:
    """Reads done flags of the working batch: at once on the CPU, one step late on CUDA.

    On CUDA the flags are copied to pinned memory behind the step that set them and read when the next step is
    already queued, so the device never idles. A row takes at most one step too many, which ``ops.unmask_`` ignores.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def poll(self, done: Tensor) -> list[bool] | None:
        """Flags of the step before this one (CUDA) or of this one; None while none have arrived."""
        if not self.on_cuda:
            return done.tolist()
        flags = torch.empty(done.shape, dtype=torch.bool, pin_memory=True)
        flags.copy_(done, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(done.device))
        self._pending.append((flags, event))
        if len(self._pending) < 2:
            return None
        flags, event = self._pending.pop(0)
        event.synchronize()
        return flags.tolist()

    def reset(self) -> None:
        """Forget flags in flight: the batch has changed."""
        self._pending.clear()


def rows_until_change(total: int, room_below: int) -> int:
    """How many of ``total`` rows are unfinished at most when the batch changes next, off the CPU.

    That is when :func:`worth_shrinking`, or when there is room for others, with at most ``room_below`` unfinished.
    """
    return max(total - (total + 3) // 4, room_below)


def worth_shrinking(finished: int, total: int, on_cpu: bool) -> bool:
    """Whether to drop finished rows that nothing can replace yet.

    On the CPU always, as each costs time; elsewhere once a quarter of the batch idles.
    """
    return finished == total or on_cpu or finished * 4 >= total
