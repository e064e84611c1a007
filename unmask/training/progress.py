"""What a person sees of a run on standard error: in a terminal one line, rewritten; elsewhere a line for each entry."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping

COLUMNS = (
    "reward", "worth", "accuracy", "nfe", "unmask_probability", "entropy", "zero_std_ratio", "rollouts_per_second",
)  # fmt: skip
IMITATION = ("imitation_loss", "expert_accuracy", "expert_nfe")
"""Shown, too, of iterations that imitate."""
SET_COLUMNS = (
    "loss", "model_loss", "survived", "states", "careful_nfe", "own_nfe", "seconds_rollouts", "seconds_update",
)  # fmt: skip
"""Of runs that train set policies."""


QUIET = 60.0
"""Seconds without a sign of life after which one is given where there is no terminal."""


class Progress:
    """Shows what a run logs, see :meth:`__call__`, and between two entries how far it is, see :meth:`passed`."""

    def __init__(self, total: int, shown: bool = True) -> None:
        self.total, self.shown, self.stream = total, shown and sys.stderr is not None, sys.stderr
        self.live, self.open = self.shown and self.stream.isatty(), False
        self.said = ""
        """The last entry, as it was shown."""
        self.written = self.began = time.monotonic()
        self.first: tuple[int, float] | None = None
        """The first iteration that was seen to end, or the one that the run begins after, and when."""

    def __call__(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show an entry of the log. In a terminal evaluations stay, and the others take the place of the one before."""
        self.said = line(values)
        self._show(iteration, self.said, stays="eval_reward" in values)

    def passed(self, iteration: int) -> None:
        """Show that the iteration is over: in a terminal at once, elsewhere after :data:`QUIET` seconds of silence."""
        if self.live or time.monotonic() - self.written >= QUIET:
            self._show(iteration, self.said if self.live else f"after {clock(time.monotonic() - self.began)}")

    def _show(self, iteration: int, said: str, stays: bool = False) -> None:
        if not self.shown:
            return
        count, now = f"{iteration:>{len(str(self.total))}}/{self.total}", time.monotonic()
        self.written = now
        if not self.live:
            print(f"{count}  {said}", file=self.stream, flush=True)
            return
        began, since = self.first = self.first or (iteration, now)
        if iteration > began:
            count += f"  {clock((now - since) / (iteration - began) * (self.total - iteration))} left"
        text, self.open = f"{count}  {said}".rstrip(), not stays
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[K" + (text[:width] if self.open else f"{text}\n"))
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.open:
            print(file=self.stream)


def clock(seconds: float) -> str:
    """Minutes and seconds: "2:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def line(values: Mapping[str, float]) -> str:
    """An entry of the log: an evaluation, or means over iterations and whether there was anything to learn from."""
    if "eval_reward" in values:
        reward, accuracy, nfe = (values[f"eval_{name}"] for name in ("reward", "accuracy", "nfe"))
        return f"held out: reward {reward:.3f}  accuracy {accuracy:.3f}  NFE {nfe:.2f}"
    columns = SET_COLUMNS if "survived" in values else (*IMITATION * ("imitation_loss" in values), *COLUMNS)
    shown = "  ".join(f"{name.replace('_', ' ')} {values[name]:.3g}" for name in columns if name in values)
    skipped = values.get("skipped", 0.0)
    mark = "" if not skipped else "  skipped: no signal" if skipped == 1 else f"  {skipped:.0%} skipped: no signal"
    return f"{shown}{mark}"
