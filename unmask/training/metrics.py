"""What a run writes down: one JSON object per line, and trackers on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """``metrics.jsonl``: lines of one "step" and its numbers, appended and flushed one by one."""

    def __init__(self, path: Path, after: int = 0) -> None:
        """Lines of steps beyond ``after`` (of a run that went on after its last checkpoint) are dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= after] if after else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def _lines(self) -> list[str]:
        """Whole lines; a last one that was cut off is not among them."""
        if not self.path.is_file():
            return []
        return [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; numbers that are not finite become null, which JSON knows."""
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Averages:
    """Running means of named numbers."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums}
        self._sums, self._counts = {}, {}
        return means
