"""Random problems of every op on the CPU, under sanitizers; not among the tests.

    python tests/fuzz/sweeping.py --cases 10000                 # of addresses and undefined behaviour; minutes an op
    python tests/fuzz/sweeping.py choose unmask --cases 300
    python tests/fuzz/sweeping.py --threads --cases 300         # of races, each op in three threads

The problems and their comparison with plain torch are those of tests/ptx/sweep_<op>.py, which import this file when
they run here. Alignment is checked too: a row of bfloat16 at an odd offset must not be read through a wider type.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize={} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
ISAS = ("avx512", "avx2", "portable")


class Case:
    """One random problem: what draws it, its name, and what is wrong with the result."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**62))
        self.group = self.text = ""
        self.errors: dict[str, float] = {}
        self.complaints: list[str] = []
        self.device: dict[str, str] = {}  # settings of the emulated GPU, which do nothing here

    def compare(self, name: str, got: torch.Tensor | None, want: torch.Tensor | None, tolerance: float) -> None:
        """Absolute, and relative where the values are above 1; NaNs and infinities must be in the same places."""
        if got is None or want is None:
            return
        got, want = got.double(), want.double()
        finite = want.isfinite()
        if not torch.equal(got[~finite].nan_to_num(7e300), want[~finite].nan_to_num(7e300)):
            self.complaints.append(f"{name}: NaN or infinity at other places")
        error = ((got - want).abs() / want.abs().clamp(min=1))[finite].nan_to_num(float("inf"))
        self.errors[name] = error.max().item() if error.numel() else 0.0
        if self.errors[name] > tolerance:
            self.complaints.append(f"{name}: error {self.errors[name]:.1e} above {tolerance:.0e}")

    def equal(self, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        if not torch.equal(got, want):
            self.complaints.append(f"{name} differ in {(got != want).sum().item()} of {want.numel()}")


def sweep(run: Callable[[Case], None]) -> None:
    """Calls ``run`` on cases of one seed; exits with 1 if any differs."""
    cases, seed, bad = int(os.environ["FUZZ_CASES"]), int(os.environ["FUZZ_SEED"]), 0
    torch.set_num_threads(1)
    for number in range(cases):
        case = Case(seed, number)
        run(case)
        bad += bool(case.complaints)
        if case.complaints:
            print(f"case {number}, {case.group}: {case.text}: {'; '.join(case.complaints)}", flush=True)
    print(f"{Path(sys.argv[0]).stem[6:]}, {os.environ['UNMASK_CPU_ISA']}: {cases} cases, {bad} bad", flush=True)
    raise SystemExit(bad > 0)


def build(threads: bool) -> Path:
    """A copy of the package whose compiled part has the sanitizers."""
    folder = ROOT / "build" / ("threads" if threads else "fuzz")
    flags = FLAGS.format("thread" if threads else "address,undefined")
    compiled = f"{flags} -include {ROOT}/tests/fuzz/threads.h" if threads else flags
    shutil.rmtree(folder / "csrc", ignore_errors=True)  # of files that are no more
    for name in ("csrc", "unmask", "tools"):
        ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    environment = {**os.environ, "UNMASK_CUDA": "0", "CFLAGS": compiled, "LDFLAGS": flags}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


def main() -> None:
    from unmask.ops import build_info

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem[6:] for path in (ROOT / "tests" / "ptx").glob("sweep_*.py"))
    parser.add_argument("ops", nargs="*", default=known, help=f"of {', '.join(known)}; all unless given")
    parser.add_argument("--cases", type=int, default=1000, help="of each op, shared by instruction sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer in place of the other two")
    options = parser.parse_args()
    if wrong := set(options.ops) - set(known):
        raise SystemExit(f"expected ops among {', '.join(known)}, got {', '.join(sorted(wrong))}")
    folder = build(options.threads)
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in (["libtsan"] if options.threads else ["libasan", "libubsan"])
    ]
    path = ":".join(map(str, (folder, Path(__file__).parent, ROOT / "tests" / "ops")))
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": path,
    }
    here = [isa for isa in ISAS if isa in build_info()["cpu_isas"]]
    environment["FUZZ_CASES"] = str(-(-options.cases // len(here)))
    failed = []
    for op in options.ops:
        for number, isa in enumerate(here):
            environment |= {"UNMASK_CPU_ISA": isa, "FUZZ_SEED": str(options.seed * len(here) + number)}
            script = ROOT / "tests" / "ptx" / f"sweep_{op}.py"
            if subprocess.run([sys.executable, str(script)], env=environment, cwd=folder).returncode:
                failed.append(f"{op} ({isa})")
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
