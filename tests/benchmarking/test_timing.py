"""How contenders are compared, timed and judged, and what is said of them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.benchmarking import calls, suite, timing
from unmask.benchmarking.calls import Captured, Flushed
from unmask.benchmarking.timing import Comparison, Machine, Stopwatch, Timing, binding, duration, judged, measure, run

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from recorded_graphs import RecordedCapture

CPU = torch.device("cpu")
FOUND = {"GB/s over 1 MiB": 1.0, "GB/s over 256 MiB": 1.0, "GFLOP/s in float32": 1.0, "GFLOP/s in bfloat16": 4.0}
MACHINE, WATCH = Machine(CPU, found=FOUND), Stopwatch(CPU, budget=0.01)


def equal(got: Any, want: Any) -> None:
    if got != want:
        raise AssertionError(f"{got} is not {want}")


def test_no_ratio_without_equal_outputs() -> None:
    slow = lambda: sum(range(1000)) and 5  # noqa: E731
    contenders = {"unmask": lambda: 5, "eager": slow, "wrong": lambda: 7, "part": lambda: None}
    c = Comparison("a", "b", contenders, equal, parts=("part",), goals={"ratio": 1.0}, bytes_moved=1)
    found = {t.contender: t for t in run(c, WATCH, MACHINE)}
    ours, eager = found["unmask"], found["eager"]
    assert (list(found), eager.ratio) == (list(contenders), 1.0)
    assert ours.ratio == eager.seconds / ours.seconds > 1
    assert (ours.goal, ours.limit, ours.limit_share) == ("1x reached", "memory", 1e-9 / ours.seconds)
    assert (found["part"].ratio, found["part"].note, found["wrong"].seconds) == (None, "", None)
    greedy = {"unmask": lambda: 5, "eager": lambda: 6}  # what is compared may be another call than is timed
    rows = run(Comparison("a", "b", {"unmask": int, "eager": int}, equal, greedy), WATCH, MACHINE)
    assert [row.note for row in rows] == ["outputs differ: 5 is not 6", ""]


def test_failures_are_named_and_rows_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no C++ compiler")

    def made(device: torch.device, quick: bool) -> Any:
        for ours in (lambda: 5, lambda: 6, lambda: torch.compile(torch.exp, backend=broken)(torch.ones(2))):
            yield Comparison("a", "b", {"unmask": ours, "eager": lambda: 5}, equal)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(timing, "suite", lambda name: made)
    kept: list[int] = []
    timings, failures = measure(["first"], WATCH, MACHINE, True, lambda rows: kept.append(len(rows)))
    assert kept == [2, 4, 6] == [2, 4, len(timings)]
    assert failures[::2] == ["a, b, unmask: outputs differ: 6 is not 5", "first: no memory left"]
    assert failures[1].startswith("a, b, unmask: unavailable: backend='broken' raised: ValueError: no C++ compiler")
    with pytest.raises(ValueError, match="unknown benchmark 'speed'; known are topk_confidence, .*, graphs"):
        suite("speed")


def test_limits_and_goals() -> None:
    def bound(**needs: Any) -> tuple[str, float]:
        return binding(Comparison("a", "b", {}, equal, **needs), MACHINE, {"part": 7.0})

    assert bound(bytes_moved=10**9, flops=10**8) == ("memory", 1.0)
    assert bound(bytes_moved=10**9, flops=2 * 10**9) == ("arithmetic", 2.0)
    assert bound(flops=2 * 10**9, dtype=torch.bfloat16) == ("arithmetic", 0.5), "products in 16 bits are faster"
    assert bound(floor="part") == ("part", 7.0)
    assert bound()[1] == 0
    judge = partial(judged, Timing("a", "b", "unmask", 12e-6, 30.0, limit_share=0.8))
    assert judge({"ratio": 25, "seconds": 1e-5}) == "25x reached, 10 µs missed"
    assert judge({"limit_share": 0.85, "seconds": 12e-6}) == "85% of the limit missed, 12 µs reached"


def test_the_machine_is_measured_once_for_each_need() -> None:
    machine = Machine(CPU)
    machine.watch = Stopwatch(CPU, budget=0.0)
    assert machine.bandwidth(3e6) == machine.bandwidth(2**21) > 1e7
    assert machine.rate(torch.float32) == machine.rate(torch.float32) > 1e7
    assert list(machine.found) == ["GB/s over 2 MiB", "GFLOP/s in float32"]
    assert Machine(CPU, found={"GB/s over 256 MiB": 2.0}).bandwidth(1e12) == 2e9


def test_rows_are_printed_and_written(tmp_path: Path) -> None:
    timings = [
        Timing("step", "batch 4", "unmask", 0.002, 25.0, "20x reached", "memory", 0.8),
        Timing("step", "batch 4", "eager", 0.05, 1.0, None, "memory", 0.03),
        Timing("step", "batch 4", "eager, compiled", note="unavailable: no C++ compiler"),
        Timing("step", "batch 4", "sum of logits", 0.001, None, None, "memory", 1.0),
        Timing("rollouts", "batch 64", "unmask", 3.0, 3.0, None, "arithmetic", 4.03, {"tokens": 123456}),
    ]
    lines = "\n".join(
        timing.report(timings, Machine(CPU, found={"GB/s over 256 MiB": 12.0, "GFLOP/s in float32": 80.4}))
    ).splitlines()
    assert [" ".join(line.split()) for line in lines if line.startswith("  ")] == [
        "unmask 2 ms 1.0x 80% of the limit, memory; goal 20x reached",
        "eager 50 ms 25.0x",
        "eager, compiled - unavailable: no C++ compiler",
        "sum of logits 1 ms",
        "unmask 3 s 1.0x 41,152 tokens/s; above the measured limit, arithmetic",
    ]
    assert lines[-1] == "12 GB/s over 256 MiB, 80.4 GFLOP/s in float32"
    assert [duration(s) for s in (1.234, 0.01234, 1.2e-5, 3.456e-9)] == ["1.23 s", "12.3 ms", "12 µs", "3.46 ns"]
    timing.write_csv(tmp_path / "new" / "rows.csv", timings, {"device": "here"})
    rows = list(csv.DictReader((tmp_path / "new" / "rows.csv").read_text(encoding="utf-8").splitlines()))
    names = ("seconds", "ratio", "goal", "limit_share", "note", "tokens", "tokens/s", "device")
    assert [rows[2][name] for name in names] == ["", "", "", "", "unavailable: no C++ compiler", "", "", "here"]
    assert [rows[4][name] for name in names] == ["3", "3", "", "4.03", "", "123456", "4.115e+04", "here"]


def test_time_is_that_of_one_call_without_its_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def taking(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])
    monkeypatch.setattr(calls, "CACHED", 4)
    flushed = Flushed(int, CPU)
    flushed.whole, flushed.flushes = taking(0.5), taking(0.375)
    assert WATCH.once(flushed, 3) == 0.125
    assert WATCH.once(Captured(taking(0.25), lambda run: (run, None), calls=8), 2) == pytest.approx(0.25 * 17 / 16)
    assert Stopwatch(CPU, budget=0.0).samples({"slow": taking(0.25)}) == {"slow": 3 * [0.25]}
    assert now[0] == 4.25 + 3 * 0.875 + 4 * 0.25, "one slow call to warm up"


def test_a_graph_does_all_calls_and_returns_what_the_last_one_did() -> None:
    x, capture = torch.zeros(1), RecordedCapture()
    captured = Captured(lambda: x.add_(1) * 10, capture, calls=7)
    assert [captured().item() for _ in range(2)] == [80.0, 150.0], "one to warm up, and 7 each"
