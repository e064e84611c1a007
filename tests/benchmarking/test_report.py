"""The printed table, as a stranger sees it."""

from __future__ import annotations

import io

import pytest

from unmask.benchmarking.report import duration, print_report
from unmask.benchmarking.timing import Machine, Timing

MACHINE = Machine(12e9, 80e9, 1.5e-6)
SETTING = "batch 4, 32 of 256 x 126464 float32"
TIMINGS = [
    Timing("step, threshold", SETTING, "unmask", 0.002, 25.0, 20.0, "memory", 0.8),
    Timing("step, threshold", SETTING, "eager", 0.05, 1.0, None, "memory", 0.03),
    Timing("step, threshold", SETTING, "eager, compiled", 0.02, 2.5, None, "memory", 0.08, setup_seconds=9.2),
    Timing("step, threshold", SETTING, "one block per row", None, None, None, "", None, note="unavailable: no nvcc"),
    Timing("step, threshold", SETTING, "sum of logits", 0.001, None, None, "memory", 1.0),
    Timing("rollouts", "batch 64", "unmask", 2.0, 3.0, 4.0, "", None, {"rollouts": 256, "tokens": 3000}),
    Timing("rollouts", "batch 64", "eager", 6.0, 1.0, None, "", None, {"rollouts": 256, "tokens": 3000}),
]


def printed(width: int) -> list[str]:
    from rich.console import Console

    out = io.StringIO()
    print_report(TIMINGS, MACHINE, Console(file=out, width=width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_one_line_for_each_contender(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    assert f"step, threshold: {SETTING}" in lines
    start = lines.index(f"step, threshold: {SETTING}")
    found = [line.split() for line in lines[start + 1 : start + 6]]
    assert found == [
        ["unmask", "2", "ms", "1.0x", "80%", "of", "memory", "limit;", "goal", "20x", "reached"],
        ["eager", "50", "ms", "25.0x"],
        ["eager,", "compiled", "20", "ms", "10.0x", "compiled", "in", "9", "s,", "not", "counted"],
        ["one", "block", "per", "row", "-", "unavailable:", "no", "nvcc"],
        ["sum", "of", "logits", "1", "ms"],
    ]
    assert "goal 4x missed" in "\n".join(lines)
    assert "12.0 GB/s" in "\n".join(lines)


def test_durations_have_three_digits() -> None:
    assert [duration(s) for s in (1.234, 0.01234, 1.2e-5, 3.456e-9)] == ["1.23 s", "12.3 ms", "12 µs", "3.46 ns"]
