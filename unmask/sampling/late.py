"""Small tensors on their way from the device to the host, which does not wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


class LateCopy:
    """Brings one tensor per step to the host: at once, or with ``late`` one step late, so that a device never idles.

    Late copies go to pinned memory behind the step that computed them, and are read after the next step is queued.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def swap(self, value: Tensor) -> Tensor | None:
        """Send ``value``, which must not change on the CPU. Returns it, with ``late`` the one sent before, if any."""
        if not self.late:
            return value
        before, event = self.receive(), None
        if value.is_cuda:
            stream = torch.cuda.current_stream(value.device)
            value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        self._sent = (value, event)
        return before

    def receive(self) -> Tensor | None:
        """Wait for what was sent; None if nothing is on its way."""
        if self._sent is None:
            return None
        (value, event), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        return value
