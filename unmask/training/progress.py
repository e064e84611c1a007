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


class Progress:
    """Shows what a run logs, see :meth:`__call__`."""

    def __init__(self, total: int, shown: bool = True) -> None:
        self.total, self.shown, self.stream = total, shown and sys.stderr is not None, sys.stderr
        self.live, self.open = self.shown and self.stream.isatty(), False
        self.first: tuple[int, float] | None = None
        """The iteration of the first entry, and when it came."""

    def __call__(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show an entry of the log. In a terminal evaluations stay, and the others take the place of the one before."""
        if not self.shown:
            return
        count, said = f"{iteration:>{len(str(self.total))}}/{self.total}", line(values)
        if not self.live:
            print(f"{count}  {said}", file=self.stream, flush=True)
            return
        now = time.monotonic()
        began, since = self.first = self.first or (iteration, now)
        if iteration > began:
            left = int((now - since) / (iteration - began) * (self.total - iteration))
            count += f"  {left // 60}:{left % 60:02} left"
        text, self.open = f"{count}  {said}", "eval_reward" not in values
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[K" + (text[:width] if self.open else f"{text}\n"))
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.open:
            print(file=self.stream)


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
