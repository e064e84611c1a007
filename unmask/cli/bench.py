"""``unmask bench``: what each operation costs on this machine, against the eager code it replaces."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.benchmarking import SUITES

DESCRIPTION = """Time the operations of a denoising step against the eager code they replace, in one run.

Outputs are compared before anything is timed; where they differ there is no ratio, and the exit status is 1.
For each operation it is said what binds (memory, arithmetic or the cost of calls, all measured here), and which share
of that limit is reached: the time the limit alone would take over the time taken."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="what each operation costs here, against eager code",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"which of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--full", action="store_true", help="all sizes and baselines; takes minutes")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each contender (default 1)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's CPU time, not time passed: for a busy machine, one thread and no GPU",
    )
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="also write the rows, with the environment, to a CSV file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from unmask.benchmarking import suite, timing
    from unmask.models.loading import checked_device
    from unmask.sampling.config import require_positive_int

    names = args.suites or SUITES
    for name in names:
        suite(name)  # an unknown one is refused before anything is measured
    if args.threads is not None:
        require_positive_int("--threads", args.threads)
        torch.set_num_threads(args.threads)
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    device, clock = checked_device(args.device), "cpu" if args.cpu_time else "wall"
    if args.cpu_time and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise ValueError(
            f"--cpu-time adds up all threads and sees no GPU: expected --threads 1 and --device cpu, got "
            f"{torch.get_num_threads()} threads and --device {args.device}"
        )
    info = {**timing.environment(device), "clock": clock}
    if not args.json:
        print(", ".join(f"{key} {value}" for key, value in info.items() if value))

    def keep(rows: list[timing.Timing]) -> None:
        if args.output:  # as far as they go: whatever stops this later, these rows are kept
            timing.write_csv(args.output, rows, info)

    machine = timing.Machine.measure(device, clock)
    watch = timing.Stopwatch(device, clock, args.seconds)
    timings, failures = timing.measure(names, watch, machine, not args.full, keep)
    if args.json:
        found = {"environment": info, "limits": asdict(machine), "timings": [asdict(t) for t in timings]}
        print(json.dumps({**found, "failures": failures}, indent=1))
    else:
        print("\n".join(timing.report(timings, machine)))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0
