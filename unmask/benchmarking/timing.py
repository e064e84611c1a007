"""Fair timings: contenders interleaved in one run, outputs compared first, medians reported."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


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


@dataclass(frozen=True)
class Timing:
    """One contender's time in one comparison, in seconds (median), and how it stands."""

    name: str
    setting: str
    contender: str
    seconds: float
    ratio: float
    """Baseline's time / this time."""
    goal: float | None
    limit: str
    """What binds: "memory" or "arithmetic", empty if unknown."""
    limit_share: float | None
    """Time that the limit alone would take / this time."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What one call produced or took."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Call, inner: int, device: torch.device) -> float:
    """Seconds per call over ``inner`` calls; on CUDA by events, so the host's launches overlap as in real use."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner
    started = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - started) / inner


def medians(contenders: Mapping[str, Call], device: torch.device, budget: float = 2.0) -> dict[str, float]:
    """Median seconds per call of each contender, measured in turns within about ``budget`` seconds each."""
    inner = {}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for name, call in contenders.items():
        call()
        synchronize(device)
        once = max(time_once(call, 1, device), 1e-7)
        inner[name] = max(1, min(1000, round(0.02 / once)))
        if inner[name] == 1:
            samples[name].append(once)
    deadline = time.perf_counter() + budget * len(contenders)
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 3:
        for name, call in contenders.items():
            samples[name].append(time_once(call, inner[name], device))
    return {name: statistics.median(values) for name, values in samples.items()}


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second: on CUDA of a large copy (read + written), on the CPU of a sum over a large array (read)."""
    count = 2**30 // 4 if device.type == "cuda" else 2**26
    x = torch.randn(count, device=device)
    if device.type == "cuda":
        y = torch.empty_like(x)
        return 2 * x.nbytes / medians({"copy": lambda: y.copy_(x)}, device, 0.5)["copy"]
    return x.nbytes / medians({"sum": x.sum}, device, 0.5)["sum"]


def arithmetic_rate(device: torch.device) -> float:
    """Float32 operations per second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return 2 * size**3 / medians({"matmul": lambda: a @ b}, device, 0.5)["matmul"]


def run(
    comparison: Comparison, device: torch.device, bandwidth: float, rate: float, budget: float = 2.0
) -> list[Timing]:
    """Check the outputs, then time all contenders. Raises AssertionError if outputs differ."""
    comparison.check()
    seconds = medians(comparison.contenders, device, budget)
    limits = {
        "memory": (comparison.bytes_moved or 0) / bandwidth,
        "arithmetic": (comparison.flops or 0) / rate,
    }
    binding = max(limits, key=limits.__getitem__)
    bound = limits[binding]
    return [
        Timing(
            name=comparison.name,
            setting=comparison.setting,
            contender=name,
            seconds=value,
            ratio=seconds[comparison.baseline] / value,
            goal=comparison.goal if name == "unmask" else None,
            limit=binding if bound else "",
            limit_share=bound / value if bound else None,
            counts=dict(comparison.counts.get(name, {})),
        )
        for name, value in seconds.items()
    ]


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
        writer.writerow(names + counted + [f"{name}/s" for name in counted] + list(info))
        for t in timings:
            share = "" if t.limit_share is None else f"{t.limit_share:.3f}"
            numbers = [f"{t.seconds:.4g}", f"{t.ratio:.3g}", "" if t.goal is None else t.goal, t.limit, share]
            counts = [f"{t.counts[name]:g}" if name in t.counts else "" for name in counted]
            rates = [f"{t.counts[name] / t.seconds:.4g}" if name in t.counts else "" for name in counted]
            writer.writerow([t.name, t.setting, t.contender, *numbers, *counts, *rates, *info.values()])
