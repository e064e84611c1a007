"""``unmask bench``: what each operation costs on this machine, against the eager code it replaces."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from unmask.cli.parsing import Command, Flag
from unmask.config import Positive, PositiveInt
from unmask.files import check_writable, make_folder


class Bench(Command):
    """Time the operations of a denoising step against the eager code they replace, in one run.

    Outputs are compared before anything is timed; where they differ there is no ratio, and the exit status is 1. For
    each operation it is said what binds (memory or arithmetic, measured here), and which share of that limit is
    reached: the time the limit alone would take over the time taken.
    """

    REST = "suites"

    suites: Positional[tuple[str, ...]] = ()
    """Which of topk_confidence, policy_forward, select_set, choose, calm_, step, blocks, quantization, generation,
    rollouts, lm_head, graphs. None: all."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: PositiveInt | None = None
    """CPU threads. None: torch's own choice."""
    full: Flag = False
    """All sizes and baselines; takes minutes."""
    seconds: Positive = 1.0
    """Time spent on each contender."""
    cpu_time: Flag = False
    """Count this process's CPU time, not time passed: for a busy machine, one thread and no GPU."""
    output: Path | None = None
    """Also write the rows, with the environment, to a CSV file."""
    json: Flag = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        import torch

        from unmask.benchmarking import SUITES, suite, timing
        from unmask.models.loading import checked_device

        names = self.suites or SUITES
        if self.output:
            make_folder(self.output.parent)
            check_writable(self.output)
        for name in names:
            suite(name)  # an unknown one is refused before anything is measured
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = checked_device(self.device)
        clock: Literal["cpu", "wall"] = "cpu" if self.cpu_time else "wall"
        if self.cpu_time and (device.type != "cpu" or torch.get_num_threads() != 1):
            raise ValueError(
                f"--cpu-time adds up all threads and sees no GPU: expected --threads 1 and --device cpu, got "
                f"{torch.get_num_threads()} threads and --device {self.device}"
            )
        info = {**timing.environment(device), "clock": clock}
        if not self.json:
            print(", ".join(f"{key} {value}" for key, value in info.items() if value))

        def keep(rows: list[timing.Timing]) -> None:
            if self.output:  # as far as they go: whatever stops this later, these rows are kept
                timing.write_csv(self.output, rows, info)

        machine = timing.Machine(device, clock)
        watch = timing.Stopwatch(device, clock, self.seconds)
        timings, failures = timing.measure(names, watch, machine, not self.full, keep)
        if self.json:
            found = {"environment": info, "limits": machine.found, "timings": [asdict(t) for t in timings]}
            print(json.dumps({**found, "failures": failures}, indent=1))
        else:
            print("\n".join(timing.report(timings, machine)))
        for failure in failures:
            print(failure, file=sys.stderr)
        return 1 if failures else 0
