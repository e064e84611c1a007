"""Fair timings: outputs compared first, contenders timed in turns, medians reported."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from unmask.benchmarking import suite
from unmask.benchmarking.calls import Call, Contender, Flushed, Unavailable, calls_in, first_line, on_device
from unmask.commit import package_commit

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Of the host: what has passed, or what this process had of it, for a core that others use too."""


@dataclass(frozen=True)
class Comparison:
    """What is timed: the same work done by several contenders on the same inputs."""

    name: str
    setting: str
    contenders: Mapping[str, Contender]
    agree: Callable[[Any, Any], None]
    """Raises AssertionError if an output differs from that of ``reference``."""
    baseline: str = "eager"
    """The contender over which ratios are taken."""
    reference: str = "eager"
    goals: Mapping[str, float] = field(default_factory=dict)
    """What "unmask" has to reach: at least a "ratio" or "limit_share", at most "seconds"."""
    bytes_moved: int = 0
    """Least bytes that must pass through memory; 0 where memory is not what binds."""
    flops: float | Callable[[], float] = 0
    """Floating-point operations that must be done, or what says so after the calls."""
    calls: int = 0
    """Kernels or operator calls that the work takes at least; 0 where their cost cannot matter."""
    floor: str | None = None
    """A contender that does a part of the work which nothing can save: its time is the limit."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By contender, what its latest call produced or took, such as {"tokens": 512}; kept up to date by the calls."""


@dataclass(frozen=True)
class Timing:
    """One contender's time in one comparison, in seconds (median), and how it stands."""

    name: str
    setting: str
    contender: str
    seconds: float | None
    """None if it was not timed: ``note`` says why."""
    ratio: float | None
    """Baseline's time / this time; None for a part of the work and for what was not timed."""
    goal: str | None
    limit: str
    """What binds: "memory", "arithmetic", "call overhead", a contender that is the floor; empty if unknown."""
    limit_share: float | None
    """Time that the limit alone would take / this time."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What one call produced or took."""
    setup_seconds: float | None = None
    """What its first call took, in which it may be compiled or captured."""
    note: str = ""
    """Why it was not timed."""
    reached: bool | None = None
    """Whether the goal was; None without one."""


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device by one of ``CLOCKS``."""

    device: torch.device
    clock: str = "wall"
    budget: float = 1.0
    """Seconds for each contender."""

    def once(self, call: Call, inner: int = 1) -> float:
        """Seconds of the work over ``inner`` calls. On CUDA by events, so the host's launches overlap as in real use."""
        if isinstance(call, Flushed):
            return self.once(call.whole, inner) - self.once(call.flushes, inner)
        now, times = CLOCKS[self.clock], inner * calls_in(call)
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / times
        started = now()
        for _ in range(inner):
            call()
        return (now() - started) / times

    def samples(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Seconds that each call takes for the work, in turns, at least three times each."""
        inner = {}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            call()
            once = max(self.once(call), 1e-7)
            inner[name] = max(1, min(1000, round(0.02 / (once * calls_in(call)))))
            if inner[name] == 1:
                taken[name].append(once)
        deadline = time.perf_counter() + self.budget * len(calls)
        while time.perf_counter() < deadline or min(map(len, taken.values())) < 3:
            for name, call in calls.items():
                taken[name].append(self.once(call, inner[name]))
        return taken

    def medians(self, calls: Mapping[str, Call]) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.samples(calls).items()}

    def fastest(self, call: Call) -> float:
        """Seconds of the fastest call: what the machine can do, whatever else runs on it now."""
        return min(self.samples({"": call})[""])


@dataclass(frozen=True)
class Machine:
    """What the machine does at best, measured in the same run."""

    bandwidth: float
    """Bytes per second: on CUDA of a large copy (read + written), on the CPU of a sum over a large array (read)."""
    rate: float
    """Float32 operations per second of a large matrix product."""
    overhead: float
    """Seconds of the smallest operator call (CPU) or of the smallest kernel in a graph (CUDA)."""

    @classmethod
    def measure(cls, device: torch.device, clock: str = "wall") -> Machine:
        cuda, watch = device.type == "cuda", Stopwatch(device, clock, 0.5)
        x = torch.randn(2**28 if cuda else 2**26, device=device)
        y = torch.empty_like(x) if cuda else x
        bandwidth = (2 * x.nbytes if cuda else x.nbytes) / watch.fastest(lambda: y.copy_(x) if cuda else x.sum())
        size = 4096 if cuda else 1024
        a, b, one = (torch.randn(n, n, device=device) for n in (size, size, 1))
        rate = 2 * size**3 / watch.fastest(lambda: a @ b)
        return cls(bandwidth, rate, watch.fastest(on_device(lambda: one.add_(1.0), device)))


def measure(
    suites: Sequence[str],
    watch: Stopwatch,
    machine: Machine,
    quick: bool = False,
    keep: Callable[[list[Timing]], None] = lambda timings: None,
) -> tuple[list[Timing], list[str]]:
    """All rows of ``suites``, and what failed in words. ``keep`` gets the rows so far after every comparison."""
    timings: list[Timing] = []
    failures = []
    for name in suites:
        try:
            for comparison in suite(name).comparisons(watch.device, quick):
                try:
                    rows = run(comparison, watch, machine)
                except RuntimeError as error:  # of the device, such as no memory left: the other rows still count
                    failures.append(f"{comparison.name}, {comparison.setting}: {error}")
                    continue
                timings += rows
                wrong = [t for t in rows if t.note and not t.note.startswith("unavailable")]
                failures += [f"{t.name}, {t.setting}, {t.contender}: {t.note}" for t in wrong]
                keep(timings)
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    return timings, failures


def run(comparison: Comparison, watch: Stopwatch, machine: Machine) -> list[Timing]:
    """Compare the outputs, then time the contenders; one whose output differs, or that has none, is not timed."""
    setup, notes = {}, {}
    ordered = sorted(comparison.contenders.items(), key=lambda item: item[0] != comparison.reference)
    want: Any = None
    for name, contender in ordered:
        started = time.perf_counter()
        try:
            got = (contender.compared or contender.call)()
            if name == comparison.reference:
                want = got
            elif not contender.part:
                comparison.agree(got, want)
        except AssertionError as difference:
            notes[name] = f"outputs differ: {difference}"
        except Unavailable as reason:
            notes[name] = f"unavailable: {first_line(reason)}"
        setup[name] = time.perf_counter() - started
    seconds = watch.medians({n: c.call for n, c in comparison.contenders.items() if n not in notes})
    binding, bound = limit(comparison, machine, seconds)
    timings = []
    for name, contender in comparison.contenders.items():
        took = seconds.get(name)
        base = None if contender.part else seconds.get(comparison.baseline)
        share = bound / took if took and bound else None
        found = {"seconds": took, "ratio": base / took if took and base else None, "limit_share": share}
        goals = comparison.goals if took and name == "unmask" else {}
        timings.append(
            Timing(
                name=comparison.name,
                setting=comparison.setting,
                contender=name,
                seconds=took,
                ratio=found["ratio"],
                goal=" and ".join(goal_text(kind, value) for kind, value in goals.items()) or None,
                limit=binding if share else "",
                limit_share=share,
                counts=dict(comparison.counts.get(name, {})) if took else {},
                setup_seconds=setup[name] if took else None,
                note=notes.get(name, ""),
                reached=all(reaches(kind, found[kind], value) for kind, value in goals.items()) if goals else None,
            )
        )
    return timings


def reaches(kind: str, found: float | None, goal: float) -> bool:
    """Whether ``found`` reaches a goal of :attr:`Comparison.goals`."""
    return found is not None and (found <= goal if kind == "seconds" else found >= goal)


def goal_text(kind: str, goal: float) -> str:
    """A goal as tables show it."""
    return {"seconds": duration(goal), "ratio": f"{goal:g}x", "limit_share": f"{goal:.0%} of the limit"}[kind]


def limit(comparison: Comparison, machine: Machine, seconds: Mapping[str, float]) -> tuple[str, float]:
    """What binds, and the seconds it alone would take; 0 if nothing is known."""
    if comparison.floor is not None:
        return comparison.floor, seconds.get(comparison.floor, 0.0)
    flops = comparison.flops() if callable(comparison.flops) else comparison.flops
    limits = {
        "memory": comparison.bytes_moved / machine.bandwidth,
        "arithmetic": flops / machine.rate,
        "call overhead": comparison.calls * machine.overhead,
    }
    binding = max(limits, key=limits.__getitem__)
    return binding, limits[binding]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from: device, threads, versions, commit."""
    from unmask import __version__
    from unmask.ops import build_info

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "isa": str(build_info()["cpu_isa"]),
        "torch": torch.__version__,
        "unmask": __version__,
        "commit": package_commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_csv(path: Path, timings: Sequence[Timing], info: Mapping[str, str]) -> None:
    """One row per timing, the environment repeated in each; what was counted gets two columns, per call and second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digits = {"seconds": ".4g", "ratio": ".3g", "limit_share": ".3f", "setup_seconds": ".3g"}
    names = [f.name for f in fields(Timing) if f.name != "counts"]
    counted = list(dict.fromkeys(name for t in timings for name in t.counts))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *counted, *(f"{name}/s" for name in counted), *info])
        writer.writeheader()
        for t in timings:
            values = {name: getattr(t, name) for name in names if getattr(t, name) is not None}
            row = {name: format(value, digits.get(name, "")) for name, value in values.items()}
            row |= {name: f"{value:g}" for name, value in t.counts.items()}
            row |= {f"{name}/s": f"{value / t.seconds:.4g}" for name, value in t.counts.items() if t.seconds}
            writer.writerow({**row, **info})
