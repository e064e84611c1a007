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
"of limit" is the time that memory traffic or arithmetic alone would take, measured here, over the time taken."""


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
        "--output", type=Path, metavar="CSV", help="also write the rows, with the environment, to a CSV file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--debug", action="store_true", help="show a full traceback on errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from unmask.benchmarking import suite, timing

    names = args.suites or SUITES
    modules = [suite(name) for name in names]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    info = timing.environment(device)
    if not args.json:
        print("  ".join(f"{key}: {value}" for key, value in info.items()))
    bandwidth, rate = timing.memory_bandwidth(device), timing.arithmetic_rate(device)
    timings, failures = [], []
    for module in modules:
        for comparison in module.comparisons(device, quick=not args.full):
            try:
                timings += timing.run(comparison, device, bandwidth, rate, args.seconds)
            except AssertionError as error:
                failures.append(f"{comparison.name}, {comparison.setting}: outputs differ, not timed: {error}")
            except RuntimeError as error:  # of the device, such as no memory left: the other rows still count
                failures.append(f"{comparison.name}, {comparison.setting}: {error}")
    if args.json:
        print(
            json.dumps({"environment": info, "timings": [asdict(t) for t in timings], "failures": failures}, indent=1)
        )
    else:
        print_table(timings, bandwidth, rate)
    for failure in failures:
        print(failure, file=sys.stderr)
    if args.output:
        timing.write_csv(args.output, timings, info)
    return 1 if failures else 0


def print_table(timings: list[Any], bandwidth: float, rate: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for name, side in (("operation", "left"), ("setting", "left"), ("contender", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for name in ("time", "speed-up", "goal", "of limit"):
        table.add_column(name, justify="right")
    counted = list(dict.fromkeys(name for t in timings for name in t.counts))
    for name in counted:
        table.add_column(f"{name}/s", justify="right")
    last = None
    for t in timings:
        key = (t.name, t.setting)
        if last is not None and key != last:
            table.add_section()
        ours = t.contender == "unmask"
        reached = t.goal is not None and t.ratio >= t.goal
        table.add_row(
            *(key if key != last else ("", "")),
            t.contender,
            duration(t.seconds),
            f"{t.ratio:.1f}x",
            "" if t.goal is None else f"{t.goal:g}x {'✓' if reached else '✗'}",
            f"{t.limit_share:.0%} {t.limit}" if ours and t.limit_share is not None else "",
            *(f"{t.counts[name] / t.seconds:,.0f}" if name in t.counts else "" for name in counted),
            style="bold" if ours else None,
        )
        last = key
    console = Console()
    console.print(table)
    console.print(f"measured limits: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s float32", style="dim")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
