"""Everything that needs a GPU, in one go and in under ten minutes: build, tests, compute-sanitizer, benchmarks.

    python benchmarks/gpu_check.py [--parts build tests sanitizer benchmarks] [--budget 570]

Needs a CUDA toolkit, torch with CUDA, pytest and numpy; nothing is fetched. A part that fails does not stop the
others. Logs, benchmark rows and a summary with device, versions and commit go to ``benchmarks/results/<device>/``;
the exit status is the number of failed steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUITES = {
    "graphs": 150,
    "topk_confidence": 60,
    "policy_forward": 60,
    "step": 60,
    "lm_head": 60,
    "generation": 40,
    "rollouts": 90,
}
"""Seconds that each may take, in the order in which they run."""
PARTS = ("build", "tests", "sanitizer", "benchmarks")
RESERVE = 10.0
"""Seconds kept back to write the summary."""


@dataclass
class Result:
    """One step of the check."""

    name: str
    status: str
    """"passed", "failed", "timed out", "skipped"."""
    seconds: float
    detail: str = ""


def describe_machine() -> dict[str, str]:
    """Device, versions and commit; each "unknown" rather than an error."""
    info = {"commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])}
    code = (
        "import json, sys, torch; ok = torch.cuda.is_available();"
        "p = torch.cuda.get_device_properties(0) if ok else None;"
        "print(json.dumps({'python': sys.version.split()[0], 'torch': torch.__version__,"
        "'torch_cuda': str(torch.version.cuda), 'device': p.name if ok else 'none',"
        "'capability': f'{p.major}{p.minor}' if ok else '',"
        "'multiprocessors': str(p.multi_processor_count) if ok else ''}))"
    )
    answer = _output([sys.executable, "-c", code])
    try:
        info.update(json.loads(answer.splitlines()[-1]))
    except (ValueError, IndexError):
        info.update({"device": "unknown", "capability": "", "torch": answer[-200:]})
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
    for folder in (Path(home) / "bin" for home in homes if home):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name) or name


class Check:
    """Runs steps one after the other, within a budget of seconds, and keeps their logs."""

    def __init__(self, folder: Path, budget: float, machine: dict[str, str]) -> None:
        self.folder, self.deadline, self.machine = folder, time.monotonic() + budget, machine
        self.results: list[Result] = []
        self.log: list[str] = []  # of the latest step
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> bool:
        """Whether the command succeeded in ``limit`` seconds, or in what is left of the budget."""
        left = min(limit, self.deadline - RESERVE - time.monotonic())
        if left < 5:
            return self.note(Result(name, "skipped", 0.0, "no time left"))
        print(f"-- {name}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        log = self.folder / f"{name.replace(' ', '-')}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=left)
                status = "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # its children too: compilers, or the program under the sanitizer
                process.wait()
                status = "timed out"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return self.note(Result(name, status, time.monotonic() - started, lines[-1] if lines else ""), lines)

    def note(self, result: Result, log: list[str] | None = None) -> bool:
        self.log = log or []
        self.results.append(result)
        self.save()  # after every step: whatever stops the check later, this much is known
        print(f"   {result.status} after {result.seconds:.0f} s: {result.detail[:160]}", flush=True)
        if result.status != "passed":
            print("\n".join(f"   | {line[:200]}" for line in self.log[-15:]), flush=True)
        return result.status == "passed"

    def save(self) -> None:
        rows = [asdict(result) for result in self.results]
        (self.folder / "summary.json").write_text(json.dumps({"machine": self.machine, "steps": rows}, indent=2) + "\n")

    def failures(self) -> int:
        return sum(result.status != "passed" for result in self.results)


def build(check: Check) -> None:
    """In place, for this device only: half the compile time."""
    environment = {"MAX_JOBS": str(min(os.cpu_count() or 1, 12))}
    if check.machine.get("capability"):
        environment["UNMASK_CUDA_ARCHS"] = check.machine["capability"]
    check.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 300, environment)
    code = "import torch; import unmask.ops as ops; print(ops.build_info()); assert torch.ops.unmask.topk_confidence"
    check.run("import", [sys.executable, "-c", code], 60)


def tests(check: Check) -> None:
    """Tests marked cuda: the GPU-only ones, and the GPU half of those that run on every device."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    check.run("tests of graphs", [*pytest, "-m", "cuda", "tests/sampling/test_graph_cuda.py"], 120)
    check.run("tests of the ops", [*pytest, "-m", "cuda", "tests/ops"], 150)
    others = [path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name not in ("ops", "cpp")]
    folders = [f"tests/{name}" for name in sorted(others) if any((ROOT / "tests" / name).glob("test_*.py"))]
    check.run("other tests", [*pytest, "-m", "cuda", *folders], 120)


def sanitizer(check: Check) -> None:
    program = [sys.executable, "benchmarks/gpu_workload.py"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if not check.run("workload", program, 60, environment):
        return
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", "3", "--print-limit", "20"]
        if tool != "initcheck":  # which must see the writes of torch's kernels as well
            options += ["--kernel-name", "kns=unmask"]
        check.run(f"sanitizer {tool}", [_tool("compute-sanitizer"), *options, *program], 100, environment)
    # Captures need torch's allocator, so only accesses outside of its blocks are seen.
    options = ["--tool", "memcheck", "--error-exitcode", "3", "--print-limit", "20"]
    check.run("sanitizer graphs", [_tool("compute-sanitizer"), *options, *program, "graphs"], 100)


def benchmarks(check: Check) -> None:
    for suite, limit in SUITES.items():
        program = [sys.executable, f"benchmarks/bench_{suite}.py", "--device", "cuda", "--seconds", "0.5"]
        check.run(f"bench {suite}", program, limit, {"COLUMNS": "160"})
        print("\n".join(f"   | {line[:200]}" for line in check.log[-40:]), flush=True)


def summarise(check: Check) -> None:
    print("\n" + "  ".join(f"{key} {value}" for key, value in check.machine.items()))
    for result in check.results:
        print(f"{result.status:10} {result.seconds:6.1f} s  {result.name}  {result.detail[:100]}")
    print(f"{check.failures()} of {len(check.results)} steps did not pass; logs are in {check.folder}")


def attempt(check: Check, part: Callable[[Check], None]) -> None:
    """A part that cannot even be started counts as one failed step."""
    try:
        part(check)
    except Exception as error:
        check.note(Result(part.__name__, "failed", 0.0, f"{type(error).__name__}: {error}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    arguments = parser.parse_args()
    started = time.monotonic()
    machine = describe_machine()
    if machine["device"] in ("none", "unknown"):
        print("torch sees no CUDA device here: nothing to check", file=sys.stderr)
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    folder = ROOT / "benchmarks" / "results" / slug / "check"
    check = Check(folder, arguments.budget - (time.monotonic() - started), machine)
    # What to know first if time runs out comes first.
    if "build" in arguments.parts:
        attempt(check, build)
    if "benchmarks" in arguments.parts:
        attempt(check, benchmarks)
    if "tests" in arguments.parts:
        attempt(check, tests)
    if "sanitizer" in arguments.parts:
        attempt(check, sanitizer)
    summarise(check)
    return min(check.failures(), 100)


if __name__ == "__main__":
    sys.exit(main())
