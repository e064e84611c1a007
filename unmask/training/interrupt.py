"""Ending a run in order: Ctrl-C and SIGTERM wait for the end of the round."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 2.0
"""Seconds within which another signal counts as the first one, forwarded by a launcher of several processes."""


class StopSignals:
    """Context that records the first SIGINT or SIGTERM in ``received``; a second one has its usual effect.

    Python delivers signals to the main thread, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        """The signal's number; 0: none yet."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # ignored in a shell's background jobs
                    # None stands for a handler that is not Python's and cannot be put back.
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            logger.warning("stopping once this round is done and saved; again to stop at once")
        elif time.monotonic() - self._since > SAME:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


def leave(number: int) -> None:
    """End as after the signal ``number``: KeyboardInterrupt for SIGINT, exit status 128 + number for others."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
