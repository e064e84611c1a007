"""Shared by the scripts in this folder: each runs one suite of ``unmask bench`` in full and keeps its rows.

The measurements themselves are in ``unmask/benchmarking/``, so that they also run where only the package is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from unmask.benchmarking.timing import environment
from unmask.cli import main

RESULTS = Path(__file__).parent / "results"


def slug(device: torch.device) -> str:
    """A folder name for the machine's device."""
    return re.sub(r"[^a-z0-9]+", "-", environment(device)["device"].lower()).strip("-")


def run(suite: str) -> int:
    """``unmask bench SUITE --full`` with this script's arguments; rows go to results/<device>/."""
    arguments = sys.argv[1:]
    device = torch.device(arguments[arguments.index("--device") + 1] if "--device" in arguments else "cpu")
    threads = f"-{arguments[arguments.index('--threads') + 1]}threads" if "--threads" in arguments else ""
    output = RESULTS / slug(device) / f"{suite}{threads}.csv"
    return main(["bench", suite, "--full", "--output", str(output), *arguments])
