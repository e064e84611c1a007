"""Fair timings: contenders interleaved in one run, outputs compared first, medians reported."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask.benchmarking.captured import Call, calls_in, on_device

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Of the host: what has passed, or what this process had of it, for a core that others use too."""


class Unavailable(Exception):
    """A baseline cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Extra:
    """A baseline that has to be made first, such as compiled code, and may not exist on this machine."""

    prepare: Callable[[], Call]
    """Raises :class:`Unavailable` with the reason."""
    check: Callable[[Call], None]
    """Raises AssertionError if the outputs of what was prepared differ from those of the others."""


@dataclass(frozen=True)
class Comparison:
    """What is timed: the same work done by several contenders on the same inputs.

    ``check`` raises AssertionError if the contenders' outputs differ; no ratio is given for work that differs.
    """

    name: str
    setting: str
    contenders: Mapping[str, Call]
    check: Call
    baseline: str = "eager"
    goal: float | None = None
    """Ratio to reach over the baseline; None if none is set."""
    bytes_moved: int | None = None
    """Least bytes that must pass through memory; None where memory is not what binds."""
    flops: int | None = None
    """Floating-point operations that must be done."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By contender, what its latest call produced or took, such as {"tokens": 512}; kept up to date by the calls."""
    calls: int | None = None
    """Kernels or operator calls that the work takes at least; None where their cost cannot matter."""
    flops_counted: tuple[str, float] | None = None
    """In place of ``flops``: a count of "unmask" and how many operations each of it needs."""
    extras: Mapping[str, Extra] = field(default_factory=dict)
    """Further baselines, by name."""
    yardsticks: frozenset[str] = frozenset()
    """Contenders that do only a part of the work, for orientation: they get no ratio."""
    floor: str | None = None
    """A yardstick that does the matrix products alone: its time is the limit."""


@dataclass(frozen=True)
class Timing:
    """One contender's time in one comparison, in seconds (median), and how it stands."""

    name: str
    setting: str
    contender: str
    seconds: float | None
    """None if it was not timed: ``note`` says why."""
    ratio: float | None
    """Baseline's time / this time; None for yardsticks and what was not timed."""
    goal: float | None
    limit: str
    """What binds: "memory", "arithmetic", "call overhead", "products", empty if unknown."""
    limit_share: float | None
    """Time that the limit alone would take / this time."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What one call produced or took."""
    setup_seconds: float | None = None
    """What preparing it took before it was timed, such as compiling."""
    note: str = ""
    """Why it was not timed."""


@dataclass(frozen=True)
class Machine:
    """What the machine does at best, measured in the same run."""

    bandwidth: float
    """Bytes per second."""
    rate: float
    """Float32 operations per second."""
    overhead: float
    """Seconds of the smallest operator call (CPU) or of the smallest kernel in a graph (CUDA)."""

    @classmethod
    def measure(cls, device: torch.device, clock: str = "wall") -> Machine:
        return cls(memory_bandwidth(device, clock), arithmetic_rate(device, clock), call_overhead(device, clock))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Call, inner: int, device: torch.device, clock: str = "wall") -> float:
    """Seconds of the work over ``inner`` calls; on CUDA by events, so the host's launches overlap as in real use."""
    now, times = CLOCKS[clock], inner * calls_in(call)
    if device.type == "cuda":
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


def medians(
    contenders: Mapping[str, Call], device: torch.device, budget: float = 2.0, clock: str = "wall"
) -> dict[str, float]:
    """Median seconds that each contender takes for the work, measured in turns within about ``budget`` seconds each."""
    return {name: statistics.median(values) for name, values in samples(contenders, device, budget, clock).items()}


def fastest(call: Call, device: torch.device, budget: float, clock: str = "wall") -> float:
    """Seconds of the fastest call: what the machine can do, whatever else runs on it now."""
    return min(samples({"": call}, device, budget, clock)[""])


def samples(
    contenders: Mapping[str, Call], device: torch.device, budget: float, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds that each contender takes for the work, in turns, at least three times each."""
    inner = {}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for name, call in contenders.items():
        call()
        synchronize(device)
        once = max(time_once(call, 1, device, clock), 1e-7)
        inner[name] = max(1, min(1000, round(0.02 / (once * calls_in(call)))))
        if inner[name] == 1:
            taken[name].append(once)
    deadline = time.perf_counter() + budget * len(contenders)
    while time.perf_counter() < deadline or min(map(len, taken.values())) < 3:
        for name, call in contenders.items():
            taken[name].append(time_once(call, inner[name], device, clock))
    return taken


def memory_bandwidth(device: torch.device, clock: str = "wall") -> float:
    """Bytes per second: on CUDA of a large copy (read + written), on the CPU of a sum over a large array (read)."""
    count = 2**30 // 4 if device.type == "cuda" else 2**26
    x = torch.randn(count, device=device)
    if device.type == "cuda":
        y = torch.empty_like(x)
        return 2 * x.nbytes / fastest(lambda: y.copy_(x), device, 0.5, clock)
    return x.nbytes / fastest(x.sum, device, 0.5, clock)


def arithmetic_rate(device: torch.device, clock: str = "wall") -> float:
    """Float32 operations per second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return 2 * size**3 / fastest(lambda: a @ b, device, 0.5, clock)


def call_overhead(device: torch.device, clock: str = "wall") -> float:
    """Seconds of an operator call on one element, back to back; on CUDA without the host's part in it."""
    x = torch.zeros(1, device=device)
    return fastest(on_device(lambda: x.add_(1.0), device), device, 0.2, clock)


def run(
    comparison: Comparison, device: torch.device, machine: Machine, budget: float = 2.0, clock: str = "wall"
) -> list[Timing]:
    """Check the outputs, then time all contenders, ``budget`` seconds each, by one of ``CLOCKS``.

    Raises AssertionError if outputs differ. An extra whose outputs differ, or that is not available, is left out and
    its row says why.
    """
    comparison.check()
    contenders, setup, notes = dict(comparison.contenders), {}, {}
    for name, extra in comparison.extras.items():
        started = time.perf_counter()
        try:
            call = extra.prepare()
            extra.check(call)
        except (Unavailable, RuntimeError) as reason:
            notes[name] = f"unavailable: {first_line(reason)}"
        except AssertionError as difference:
            notes[name] = f"outputs differ: {difference}"
        else:
            contenders[name], setup[name] = call, time.perf_counter() - started
    seconds = medians(contenders, device, budget, clock)
    binding, bound = limit(comparison, machine, seconds)
    baseline = seconds.get(comparison.baseline)
    rows = [
        Timing(
            name=comparison.name,
            setting=comparison.setting,
            contender=name,
            seconds=value,
            ratio=None if baseline is None or name in comparison.yardsticks else baseline / value,
            goal=comparison.goal if name == "unmask" else None,
            limit=binding if bound else "",
            limit_share=bound / value if bound else None,
            counts=dict(comparison.counts.get(name, {})),
            setup_seconds=setup.get(name),
        )
        for name, value in seconds.items()
    ]
    missing = [
        Timing(comparison.name, comparison.setting, name, None, None, None, "", None, note=note)
        for name, note in notes.items()
    ]
    partial = [t for t in rows if t.contender in comparison.yardsticks]
    return [t for t in rows if t not in partial] + missing + partial


def run_all(
    suites: Mapping[str, Any], device: torch.device, machine: Machine, budget: float, clock: str, quick: bool
) -> Iterator[tuple[list[Timing], list[str]]]:
    """The rows of each comparison of ``suites``, and what went wrong with it: one failure does not stop the others."""
    for name, module in suites.items():
        try:
            comparisons = module.comparisons(device, quick=quick)
        except RuntimeError as error:
            yield [], [f"{name}: {error}"]
            continue
        for comparison in comparisons:
            title = f"{comparison.name}, {comparison.setting}"
            try:
                rows = run(comparison, device, machine, budget, clock)
            except AssertionError as error:
                yield [], [f"{title}: outputs differ, not timed: {error}"]
            except RuntimeError as error:  # of the device, such as no memory left
                yield [], [f"{title}: {error}"]
            else:
                yield rows, [f"{title}, {t.contender}: {t.note}" for t in rows if t.note.startswith("outputs differ")]


def limit(comparison: Comparison, machine: Machine, seconds: Mapping[str, float]) -> tuple[str, float]:
    """What binds, and the seconds it alone would take; 0 if nothing is known."""
    if comparison.floor is not None:
        return "products", seconds[comparison.floor]
    flops = float(comparison.flops or 0)
    if comparison.flops_counted is not None:
        counted, each = comparison.flops_counted
        flops = comparison.counts["unmask"][counted] * each
    limits = {
        "memory": (comparison.bytes_moved or 0) / machine.bandwidth,
        "arithmetic": flops / machine.rate,
        "call overhead": (comparison.calls or 0) * machine.overhead,
    }
    binding = max(limits, key=limits.__getitem__)
    return binding, limits[binding]


def first_line(error: BaseException, length: int = 100) -> str:
    """What an error says, cut to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from: device, threads, versions, commit."""
    from unmask import __version__
    from unmask.ops import build_info

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "isa": str(build_info()["cpu_isa"]),
        "torch": torch.__version__,
        "unmask": __version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Short commit of the working directory's repository, with ``+`` if files changed; empty outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def write_csv(path: Path, timings: Sequence[Timing], info: Mapping[str, str]) -> None:
    """One row per timing, the environment repeated in each; what was counted gets two columns, per call and second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ["name", "setting", "contender", "seconds", "ratio", "goal", "limit", "limit_share"]
        counted = list(dict.fromkeys(name for t in timings for name in t.counts))
        writer.writerow(names + counted + [f"{name}/s" for name in counted] + ["setup_seconds", "note"] + list(info))
        for t in timings:
            numbers = [_digits(t.seconds, 4), _digits(t.ratio, 3), "" if t.goal is None else t.goal]
            share = "" if t.limit_share is None else f"{t.limit_share:.3f}"
            counts = [f"{t.counts[name]:g}" if name in t.counts else "" for name in counted]
            rates = [f"{t.counts[name] / t.seconds:.4g}" if name in t.counts and t.seconds else "" for name in counted]
            made = [_digits(t.setup_seconds, 3), t.note]
            writer.writerow(
                [t.name, t.setting, t.contender, *numbers, t.limit, share, *counts, *rates, *made, *info.values()]
            )


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"
