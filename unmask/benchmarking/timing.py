"""Fair timings: outputs compared first, contenders timed in turns, medians reported."""

from __future__ import annotations

import csv
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.benchmarking import suite
from unmask.benchmarking.calls import Call, Flushed
from unmask.commit import package_commit
from unmask.ops import build_info

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # time that has passed, or that this process had


@dataclass(frozen=True)
class Comparison:
    """What is timed: the same work done by several contenders on the same inputs."""

    name: str
    setting: str
    contenders: Mapping[str, Call]
    agree: Callable[[Any, Any], None]
    """Raises AssertionError if an output (first) differs from that of ``baseline`` (second, None if there is none)."""
    compared: Mapping[str, Call] = field(default_factory=dict)
    """What gives the output to compare, for contenders whose own is random."""
    parts: Sequence[str] = ()
    """Contenders that do only a part of the work, for orientation: they are not compared and get no ratio."""
    baseline: str = "eager"
    """The contender over which ratios are taken."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """What "unmask" has to reach: at least a "ratio" or "limit_share", at most "seconds"."""
    bytes_moved: float = 0
    """Least bytes that must pass through memory; 0 where memory is not what binds."""
    flops: float = 0
    """Floating-point operations that must be done."""
    dtype: torch.dtype = torch.float32
    """In which they are done."""
    floor: str | None = None
    """A contender that does a part of the work which nothing can save: its time is the limit."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By contender, what its latest call produced or took, such as {"tokens": 512}; kept up to date by the calls."""


@dataclass(frozen=True)
class Timing:
    """One contender's time in one comparison, and how it stands."""

    name: str
    setting: str
    contender: str
    seconds: float | None = None
    """The median; None if it was not timed: ``note`` says why."""
    ratio: float | None = None
    """Baseline's time / this time; None for a part of the work."""
    goal: str | None = None
    """What "unmask" had to reach, and whether it did."""
    limit: str = ""
    """What binds: "memory", "arithmetic" or the contender that is the floor; empty if unknown."""
    limit_share: float | None = None
    """Time that the limit alone would take / this time."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What one call produced or took."""
    note: str = ""


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device by one of ``CLOCKS``."""

    device: torch.device
    clock: str = "wall"
    budget: float = 1.0
    """Seconds for each contender."""

    def once(self, call: Call, inner: int = 1) -> float:
        """Seconds of the work over ``inner`` calls; on CUDA by events, so that launches overlap as in real use."""
        if isinstance(call, Flushed):
            return self.once(call.whole, inner) - self.once(call.flushes, inner)
        now, times = CLOCKS[self.clock], inner * getattr(call, "calls", 1)
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
        """Seconds that each call takes for the work, in turns, at least three times each after one to warm up."""
        inner = {}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            call()
            once = max(self.once(call), 1e-7)
            inner[name] = max(1, min(1000, round(0.02 / (once * getattr(call, "calls", 1)))))
            if inner[name] == 1:
                taken[name].append(once)
        deadline = time.perf_counter() + self.budget * len(calls)
        while time.perf_counter() < deadline or min(map(len, taken.values())) < 3:
            for name, call in calls.items():
                taken[name].append(self.once(call, inner[name]))
        return taken


class Machine:
    """What the machine does at best, by the fastest call, whatever else runs on it; measured when first asked for."""

    SIZES = tuple(2**n for n in range(20, 29))
    """Bytes of the arrays by which memory is measured: small ones stay in caches, which are faster."""

    def __init__(self, device: torch.device, clock: str = "wall", found: Mapping[str, float] | None = None) -> None:
        self.device, self.watch = device, Stopwatch(device, clock, 0.3)
        self.found = dict(found or {})
        """What has been measured, by its name."""

    def _best(self, name: str, work: float, call: Call) -> float:
        """``work`` per second of ``call``."""
        if name not in self.found:
            self.found[name] = work / min(self.watch.samples({"": call})[""])
        return self.found[name]

    def bandwidth(self, size: float) -> float:
        """Bytes per second over ``size`` bytes: on the CPU of a sum (read) over an array of about that size, on CUDA of
        a copy (read + written) that no cache holds, as the benchmarks' own inputs."""
        cuda = self.device.type == "cuda"
        nearest = 2**30 if cuda else min(self.SIZES, key=lambda one: abs(one - size))
        name = f"GB/s over {nearest >> 20} MiB"
        x = torch.randn(nearest // 4 if name not in self.found else 0, device=self.device)
        y = torch.empty_like(x) if cuda else x
        return 1e9 * self._best(name, (1 + cuda) * x.nbytes / 1e9, lambda: y.copy_(x) if cuda else x.sum())

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second of a large matrix product in ``dtype``."""
        size = 4096 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 1e9 * self._best(f"GFLOP/s in {str(dtype)[6:]}", 2 * size**3 / 1e9, lambda: a @ b)


def measure(
    suites: Iterable[str], watch: Stopwatch, machine: Machine, quick: bool, keep: Callable[[list[Timing]], Any]
) -> tuple[list[Timing], list[str]]:
    """All rows of ``suites``, and what failed, in words. ``keep`` gets the rows so far after every comparison."""
    timings: list[Timing] = []
    failures = []
    for name in suites:
        try:
            for comparison in suite(name)(watch.device, quick):
                rows = run(comparison, watch, machine)
                timings += rows
                wrong = [t for t in rows if t.note and (t.contender == "unmask" or "outputs differ" in t.note)]
                failures += [f"{t.name}, {t.setting}, {t.contender}: {t.note}" for t in wrong]
                keep(timings)
        except RuntimeError as error:  # such as no memory left for the inputs: the other suites still count
            failures.append(f"{name}: {error}")
    return timings, failures


def run(comparison: Comparison, watch: Stopwatch, machine: Machine) -> list[Timing]:
    """Compare the outputs, then time the contenders. One whose output differs, or that has none, is not timed."""
    c, notes = comparison, {}
    compared = {**c.contenders, **c.compared}
    want = compared[c.baseline]() if c.baseline in compared else None
    for name, call in compared.items():
        try:
            got = want if name == c.baseline else call()
            if name not in c.parts:
                c.agree(got, want)
        except (AssertionError, RuntimeError) as error:  # an error of a compiler, or no memory
            what = "outputs differ" if isinstance(error, AssertionError) else "unavailable"
            notes[name] = f"{what}: {' '.join(str(error).split())[:100] or type(error).__name__}"
    taken = watch.samples({name: call for name, call in c.contenders.items() if name not in notes})
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    limit, bound = binding(c, machine, seconds)
    timings = []
    for name in c.contenders:
        row = Timing(c.name, c.setting, name, note=notes.get(name, ""))
        if took := seconds.get(name):
            base = None if name in c.parts else seconds.get(c.baseline)
            row = replace(row, seconds=took, counts=c.counts.get(name, {}), ratio=base / took if base else None)
            row = replace(row, limit=limit, limit_share=bound / took) if bound else row
            row = replace(row, goal=judged(row, c.goals)) if name == "unmask" else row
        timings.append(row)
    return timings


def judged(t: Timing, goals: Mapping[str, float]) -> str | None:
    """Each of ``Comparison.goals``, and whether it was reached; None without any."""
    words = {"seconds": duration, "ratio": "{:g}x".format, "limit_share": "{:.0%} of the limit".format}
    said = []
    for name, goal in goals.items():
        found = getattr(t, name) or 0.0
        reached = found <= goal if name == "seconds" else found >= goal
        said.append(f"{words[name](goal)} {'reached' if reached else 'missed'}")
    return ", ".join(said) or None


def binding(comparison: Comparison, machine: Machine, seconds: Mapping[str, float]) -> tuple[str, float]:
    """What binds, and the seconds it alone would take; 0 if nothing is known."""
    if comparison.floor is not None:
        return comparison.floor, seconds.get(comparison.floor, 0.0)
    moved, flops = comparison.bytes_moved, comparison.flops
    limits = {"memory": moved / machine.bandwidth(moved) if moved else 0.0}
    limits["arithmetic"] = flops / machine.rate(comparison.dtype) if flops else 0.0
    return max(limits.items(), key=lambda limit: limit[1])


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= f), (1e-9, "ns"))
    return f"{seconds / factor:.3g} {unit}"


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from: device, threads, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[1] if cpu else platform.machine()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "isa": str(build_info()["cpu_isa"]),
        "torch": torch.__version__,
        "unmask": __version__,
        "commit": package_commit(),
    }


def write_csv(path: Path, timings: Sequence[Timing], info: Mapping[str, str]) -> None:
    """One row per timing, the environment repeated in each; what was counted gets two columns, per call and second."""
    rows: list[dict[str, Any]] = []
    for t in timings:
        rates = {f"{name}/s": value / t.seconds for name, value in t.counts.items() if t.seconds}
        rows.append({**asdict(t), **t.counts, **rates, **info})
        del rows[-1]["counts"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def report(timings: Sequence[Timing], machine: Machine) -> Iterator[str]:
    """Lines: what each contender takes, and how many times as long as unmask, if it does all of the work."""
    for (name, setting), group in groupby(timings, key=lambda t: (t.name, t.setting)):
        yield f"\n{name}: {setting}"
        rows = list(group)
        ours = rows[0].seconds  # "unmask" comes first
        for t in rows:
            factor = f"{t.seconds / ours:.1f}x" if ours and t.seconds and t.ratio else ""
            took = duration(t.seconds) if t.seconds else "-"
            yield f"  {t.contender:<20} {took:>9} {factor:>8}  {'; '.join(remarks(t))}".rstrip()
    if machine.found:
        yield "\nA limit's share is the time that it alone would take over the time taken. Measured here:"
        yield ", ".join(f"{value:.3g} {name}" for name, value in machine.found.items())


def remarks(t: Timing) -> Iterator[str]:
    """What there is to say of a row beside its time."""
    if t.seconds and t.counts:
        first = next(iter(t.counts))  # what the comparison is about; the others are in the rows and in JSON
        yield f"{t.counts[first] / t.seconds:,.0f} {first}/s"
    if t.contender == "unmask" and t.limit_share is not None:
        above = "above the measured limit"  # which then is none
        yield f"{above if t.limit_share > 1 else f'{t.limit_share:.0%} of the limit'}, {t.limit}"
    if t.goal:
        yield f"goal {t.goal}"
    if t.note:
        yield t.note
