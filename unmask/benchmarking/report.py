"""The table that ``unmask bench`` prints: one section per comparison, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from unmask.benchmarking.timing import Machine, Timing, duration


def print_report(timings: Sequence[Timing], machine: Machine, console: Any = None) -> None:
    """One section per comparison: what each contender takes, and how many times as long as unmask."""
    from rich.console import Console

    console = console or Console()
    for (name, setting), group in groupby(timings, key=lambda t: (t.name, t.setting)):
        console.print(f"\n{name}: {setting}", style="bold", highlight=False, soft_wrap=True)
        console.print(section(list(group)))
    console.print(
        "\nFactors say how many times as long as unmask a contender takes; those without one do part of the work only. "
        "A limit's share is the time that the limit alone would take over the time taken. Measured here: "
        f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s float32, "
        f"{duration(machine.overhead)} per call.",
        style="dim",
        highlight=False,
    )


def section(timings: Sequence[Timing]) -> Any:
    """The rows of one comparison as a rich table without lines."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=17, no_wrap=True)
    table.add_column(min_width=8, justify="right", no_wrap=True)
    table.add_column(min_width=7, justify="right", no_wrap=True)
    table.add_column(ratio=1)
    ours = next((t.seconds for t in timings if t.contender == "unmask"), None)
    for t in timings:
        factor = "" if ours is None or t.seconds is None or t.ratio is None else f"{t.seconds / ours:.1f}x"
        table.add_row(
            f"  {t.contender}",
            "-" if t.seconds is None else duration(t.seconds),
            factor,
            "; ".join(remarks(t)),
            style="green" if t.contender == "unmask" else "",
        )
    return table


def remarks(t: Timing) -> list[str]:
    """What there is to say of a row beside its time."""
    said = []
    if t.seconds and t.counts:
        first = next(iter(t.counts))  # what the comparison is about; the others are in the rows and in JSON
        said.append(f"{t.counts[first] / t.seconds:,.0f} {first}/s")
    if t.contender == "unmask" and t.limit_share is not None:
        said.append(share(t.limit, t.limit_share))
    if t.goal:
        said.append(f"goal {t.goal} {'reached' if t.reached else 'missed'}")
    if t.setup_seconds is not None and t.setup_seconds >= 0.5 and "compiled" in t.contender:
        said.append(f"compiled in {t.setup_seconds:.0f} s, not counted")
    if t.note:
        said.append(t.note)
    return said


def share(limit: str, value: float) -> str:
    """A share above 1 says no more than that what was measured as the limit is none."""
    return f"above the measured {limit} limit" if value > 1 else f"{value:.0%} of {limit} limit"
