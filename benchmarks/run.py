"""Whole result files: suites of ``unmask bench`` in full, each in a process of its own.

    python benchmarks/run.py [SUITE ...] [options of unmask bench, such as --device cuda or --threads 1]

The rows of a suite go to ``benchmarks/results/<device>/<suite>.csv``, or ``<suite>-1threads.csv`` with ``--threads 1``.
The measurements are in ``unmask/benchmarking/``, so that they also run where only the package is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from unmask.benchmarking import SUITES
from unmask.benchmarking.timing import environment

RESULTS = Path(__file__).parent / "results"


def folder(device: str) -> str:
    """The name of a device as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main(arguments: list[str]) -> int:
    """The number of suites in which something failed."""
    suites = [argument for argument in arguments if argument in SUITES]
    options = [argument for argument in arguments if argument not in SUITES]
    given = dict(zip(options, [*options[1:], ""], strict=True))
    device = environment(torch.device(given.get("--device", "cpu")))["device"]
    threads = f"-{given['--threads']}threads" if "--threads" in given else ""
    failed = 0
    for suite in suites or SUITES:
        output = RESULTS / folder(device) / f"{suite}{threads}.csv"
        command = [sys.executable, "-m", "unmask", "bench", suite, "--full", "--output", str(output), *options]
        failed += subprocess.run(command).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
