"""Everything that needs a GPU: build, tests, benchmarks, compute-sanitizer.

    python benchmarks/gpu_check.py [build] [tests] [benchmarks] [sanitizer] [--budget 570] [--archive check.tar.gz]

Each part by itself takes less than ten minutes; without any, all of them run as far as the budget goes. A step that
fails does not stop the others. Logs, benchmark rows and a summary with device, versions and commit go to
``benchmarks/results/<device>/``, and into one archive if asked for; the exit status is the number of failed steps.
Needs a CUDA toolkit, torch with CUDA, pytest and numpy; nothing is fetched.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "topk_confidence": 100,
    "policy_forward": 90,
    "select_set": 50,
    "choose": 30,
    "step": 110,
    "graphs": 80,
    "lm_head": 30,
    "generation": 30,
    "rollouts": 50,
}
"""Seconds that each may take, in the order in which they run; one that is stopped keeps the rows it has."""
RESERVE = 5.0
"""Seconds kept back to write the summary."""
FAILED = ("failed", "timed out", "skipped")
VERSIONS = """
import json, sys, torch
ok = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if ok else None
print(json.dumps({
    "device": p.name if ok else "none", "capability": f"{p.major}{p.minor}" if ok else "",
    "multiprocessors": p.multi_processor_count if ok else 0,
    "python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": torch.version.cuda,
}))
"""


@dataclass
class Result:
    """One step of the check."""

    name: str
    status: str
    """"passed", one of ``FAILED``, or what a step is that may fail: "unavailable" here, "noted" for information."""
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status:11} {self.seconds:4.0f} s  {self.name:22} {self.detail[:110]}"


def describe_machine() -> dict[str, str]:
    """Device, versions and commit; each "unknown" rather than an error."""
    answer = _output([sys.executable, "-c", VERSIONS])
    try:
        info = json.loads(answer.splitlines()[-1])
    except ValueError:
        info = {"device": "unknown", "capability": "", "torch": answer[-200:]}
    info["commit"] = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    info["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    info["nvcc"] = _output([_tool("nvcc"), "--version"]).splitlines()[-1]
    return info


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _tool(name: str) -> str:
    """Path of a program of the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(home) / "bin" / name for home in homes if home]
    return next((str(path) for path in found if path.exists()), shutil.which(name) or name)


class Check:
    """Runs steps one after the other, within a budget of seconds, and keeps their logs."""

    def __init__(self, folder: Path, parts: list[str], budget: float, machine: dict[str, str]) -> None:
        self.folder, self.logs, self.machine = folder, folder / "check", machine
        self.summary = self.logs / f"{'-'.join(parts)}.json"
        self.deadline = time.monotonic() + budget
        self.results: list[Result] = []
        self.logs.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        environment: dict[str, str] | None = None,
        otherwise: str = "",
    ) -> bool:
        """Whether the command succeeded in ``limit`` seconds, or in what is left of the budget.

        ``otherwise``: the status if it did not, where that is no failure of the check.
        """
        left = min(limit, self.deadline - RESERVE - time.monotonic())
        if left < 5:
            return self.note(Result(name, "skipped", 0.0, "no time left"))
        started = time.monotonic()
        log = self.logs / f"{name.replace(' ', '-')}.log"
        try:
            status = self._wait(command, left, {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}, log)
        except OSError as error:
            status = "failed"
            log.write_text(f"{command[0]}: {error}\n")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if status != "passed" and otherwise:
            lines, status = [*lines, f"({status})"], otherwise
        return self.note(Result(name, status, time.monotonic() - started, lines[-1] if lines else ""), lines)

    def _wait(self, command: list[str], seconds: float, environment: dict[str, str], log: Path) -> str:
        with log.open("w") as file:
            file.write(f"{' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return "passed" if process.wait(timeout=seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                return "timed out"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its children too: compilers, or what the sanitizer runs
                    process.wait()

    def note(self, result: Result, log: list[str] | None = None) -> bool:
        """Add a result, and save all of them: whatever stops the check later, this much is known."""
        self.results.append(result)
        steps = [asdict(result) for result in self.results]
        self.summary.write_text(json.dumps({"machine": self.machine, "steps": steps}, indent=2) + "\n")
        print(result, flush=True)
        if result.status in FAILED and log:
            print("\n".join(f"   | {text[:160]}" for text in log[-12:]), flush=True)
        return result.status == "passed"

    def failures(self) -> int:
        return sum(result.status in FAILED for result in self.results)


def build(check: Check) -> None:
    """In place, for this device only: half the compile time."""
    environment = {"MAX_JOBS": str(min(os.cpu_count() or 1, 12))}
    if check.machine.get("capability"):
        environment["UNMASK_CUDA_ARCHS"] = check.machine["capability"]
    check.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 220, environment)
    code = "import torch; import unmask.ops as ops; print(ops.build_info()); assert torch.ops.unmask.topk_confidence"
    check.run("import", [sys.executable, "-c", code], 40)


def tests(check: Check) -> None:
    """Tests marked cuda: the GPU-only ones, and the GPU half of those that run on every device."""
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
        "-m",
        "cuda",
    ]
    graphs = "tests/sampling/test_graphs.py"
    check.run("tests of the ops", [*pytest, "tests/ops"], 110)
    check.run("tests of graphs", [*pytest, graphs], 120)
    rest = ["--ignore=tests/ops", f"--ignore={graphs}", "--continue-on-collection-errors"]
    check.run("other tests", [*pytest, *rest, "tests"], 80)


def benchmarks(check: Check) -> None:
    """All suites in full, operations with a warm and with a flushed cache."""
    for suite, limit in SUITES.items():
        rows = check.folder / f"{suite}.csv"
        rows.unlink(missing_ok=True)
        options = ["--full", "--device", "cuda", "--seconds", "0.5", "--output", str(rows)]
        check.run(f"bench {suite}", [sys.executable, "-m", "unmask", "bench", suite, *options], limit)
        if rows.exists():
            print("\n".join(f"   | {text}" for text in measured(rows)), flush=True)


def measured(path: Path) -> Iterator[str]:
    """What the library took, one line for each comparison."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["contender"] == "unmask":
                took = f"{float(row['seconds']) * 1e6:10.1f} us" if row["seconds"] else row["note"]
                share = f"{float(row['limit_share']):.0%} of {row['limit']}" if row["limit_share"] else ""
                ratio = f"{row['ratio']}x" if row["ratio"] else ""
                yield f"{took} {ratio:>7}  {row['name']}: {row['setting'][:60]}  {share}  {row['goal']}".rstrip()


def sanitizer(check: Check) -> None:
    """All kernels under each of compute-sanitizer's tools, if it can run a program on this machine at all."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "benchmarks/gpu_workload.py"]
    watch = [_tool("compute-sanitizer"), "--error-exitcode", "3", "--print-limit", "20", "--tool"]
    memcheck = [*watch, "memcheck", "--report-api-errors", "no"]
    ours = ["--kernel-name", "kns=unmask"]
    trivial = [sys.executable, "-c", "import torch; print(torch.ones(1, device='cuda').add_(1).item())"]
    if not check.run("workload", program, 60, environment):
        return
    if not check.run("sanitizer at all", [*memcheck, *trivial], 60, environment, otherwise="unavailable"):
        return
    check.run("sanitizer memcheck", [*memcheck, *ours, *program], 100, environment)
    check.run("sanitizer racecheck", [*watch, "racecheck", *ours, *program], 100, environment)
    check.run("sanitizer synccheck", [*watch, "synccheck", *ours, *program], 80, environment)
    # Captures need torch's allocator, so only accesses outside of its blocks are seen.
    check.run("sanitizer graphs", [*memcheck, *program, "graphs"], 90)
    # It has to see the writes of torch's kernels too, and finds fault with some of their reads.
    check.run("sanitizer initcheck", [*watch, "initcheck", *program], 70, environment, otherwise="noted")


PARTS: dict[str, Callable[[Check], None]] = {part.__name__: part for part in (build, tests, benchmarks, sanitizer)}
"""In the order in which they run: whether results are right comes before how fast they are."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything (default 570)")
    parser.add_argument("--archive", type=Path, metavar="PATH", help="pack all results and logs in one .tar.gz")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    parts = [part for part in PARTS if part in (arguments.parts or PARTS)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever stops the check, the archive is written
    started = time.monotonic()
    machine = describe_machine()
    if machine["device"] in ("none", "unknown"):
        print("torch sees no CUDA device here: nothing to check", file=sys.stderr)
        return 2
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    check = Check(folder, parts, arguments.budget - (time.monotonic() - started), machine)
    try:
        for part in parts:
            try:
                PARTS[part](check)
            except Exception as error:  # a part that cannot even be started counts as one failed step
                check.note(Result(part, "failed", 0.0, f"{type(error).__name__}: {error}"))
    finally:
        print("\n" + "  ".join(f"{key} {value}" for key, value in machine.items()))
        print("\n".join(map(str, check.results)))
        print(f"{check.failures()} of {len(check.results)} steps did not pass; logs are in {check.logs}")
        if arguments.archive:
            arguments.archive.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(arguments.archive, "w:gz") as file:
                file.add(folder, arcname=folder.name)
    return min(check.failures(), 100)


if __name__ == "__main__":
    sys.exit(main())
