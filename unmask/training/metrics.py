"""The metrics of a run: a log with one JSON object per line, and what it holds."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unmask.files import write_atomically
from unmask.training.grpo import NO_SIGNAL
from unmask.training.rollout import Rollouts

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsLog:
    """``metrics.jsonl``: lines of a "step" and its numbers, appended and flushed one by one."""

    def __init__(self, path: Path, after: int = 0) -> None:
        """Drops lines of steps beyond ``after``, which a run wrote after its last checkpoint, and damaged ones."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if 0 <= step_of(line) <= after] if after else []
        if damaged := sum(step_of(line) < 0 for line in self._lines()):
            logger.warning("%s: dropped %d lines that are damaged", path, damaged)
        write_atomically(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))

    def _lines(self) -> list[str]:
        """The complete lines, without a last one that was cut off."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        return [f"{line}\n" for line in text.split("\n")[:-1]]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; numbers that are not finite become null, as JSON has no other form for them."""
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def step_of(line: str) -> float:
    """The step of a line of the log, -1 if it is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1


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


class SkippedRounds:
    """Counts consecutive rounds without a signal."""

    MANY = 10

    def __init__(self) -> None:
        self.count = 0
        self.unfinished = 0.0

    def add(self, rollouts: Rollouts) -> bool:
        """Count a round; True once, when there are ``MANY``."""
        self.count += 1
        self.unfinished += (~rollouts.finished).double().mean().item()
        return self.count == self.MANY

    def advice(self) -> str:
        """The warning about many skipped rounds."""
        return (
            f"nothing was learned in {self.count} rounds: in each group all rewards were equal, and "
            f"{self.unfinished / self.count:.0%} of the rollouts ended with masks left. If they do not finish, let a "
            "fresh policy unmask more (policy: {output_bias: -1}) or imitate an expert first (expert, "
            "imitation_steps); if all answers are right, or all wrong, the task is too easy or too hard for the model"
        )


def describe(rollouts: Rollouts, worth: Tensor, rewards: Tensor, worth_name: str) -> dict[str, float]:
    """Means over the rollouts, those of experts under names with "expert_"; squares for :func:`with_deviation`.

    The mean of ``worth`` (N,) is called ``worth_name``: "accuracy" for a grader, "worth" for reward functions.
    """
    metrics: dict[str, float] = {}
    for prefix, chosen in (("", ~rollouts.expert), ("expert_", rollouts.expert)):
        if not bool(chosen.any()):
            continue
        steps = rollouts.steps[chosen].double()
        metrics |= {
            f"{prefix}reward": rewards[chosen].mean().item(),
            f"{prefix}{worth_name}": worth[chosen].mean().item(),
            f"{prefix}nfe": steps.mean().item(),
        }
        if not prefix:
            metrics["nfe_square"] = steps.square().mean().item()
            metrics["still_masked"] = (~rollouts.finished[chosen]).double().mean().item()
    if rollouts.group_size > 1:
        spread = rewards.view(-1, rollouts.group_size).std(dim=1)
        metrics["zero_std_ratio"] = (spread < NO_SIGNAL).double().mean().item()
    return metrics


def with_deviation(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with the NFE's mean square turned into its standard deviation, over all processes' rollouts."""
    if "nfe_square" in metrics:
        metrics["nfe_std"] = max(0.0, metrics.pop("nfe_square") - metrics["nfe"] ** 2) ** 0.5
    return metrics
